"""Checkpoints: Orbax writes the arrays, and a manifest of our own seals them."""
