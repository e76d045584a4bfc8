"""The kinds of jobs: each defines the process to start, its messages, and the metrics derived from its readings."""
