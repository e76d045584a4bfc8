"""Checks on known amounts, which prove what can be measured on this machine."""
