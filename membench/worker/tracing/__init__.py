"""Estimating a case by running its stages on fake tensors, which have shapes and no memory."""
