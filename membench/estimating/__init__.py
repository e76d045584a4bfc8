"""Estimates of what cases need before they are run, and what follows from them."""
