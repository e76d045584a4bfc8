"""Measurements for comparisons: with a baseline, with another commit, or of the same code with itself."""
