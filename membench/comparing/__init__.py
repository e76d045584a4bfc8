"""Measure in order to compare: against a baseline, against another commit, against itself."""
