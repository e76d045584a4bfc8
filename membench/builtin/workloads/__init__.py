"""Workloads: what is done with a model. Forward passes, generation, training, reading data."""
