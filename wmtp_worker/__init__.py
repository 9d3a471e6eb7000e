"""Weighted multi-token prediction training on machines that may vanish at any moment."""

__version__ = "0.1.0"
