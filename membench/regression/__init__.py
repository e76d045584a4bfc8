"""Judging a measurement against an earlier one: tolerances, noise, statistics, attribution, gates, baselines."""
