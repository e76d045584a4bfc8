"""Techniques that save memory, a family a file, and what the techniques of a family share."""
