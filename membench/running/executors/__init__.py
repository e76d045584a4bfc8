"""Executors: run jobs on this machine, or elsewhere through the same interface."""
