"""Layers and caches that techniques put in place of a model's own. They import torch when they are loaded."""
