"""Techniques that spread a case over ranks, by torch's own machinery."""
