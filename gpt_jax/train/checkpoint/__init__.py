"""Checkpoints: arrays through Orbax, sealed by a manifest of our own."""
