"""Prove on known amounts what can be measured on this machine."""
