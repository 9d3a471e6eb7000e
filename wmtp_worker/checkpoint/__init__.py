"""Checkpoints: written whole, verified before use, newest first. Knows tensors by name, never a model class."""
