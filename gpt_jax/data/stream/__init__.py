"""Turns token ids into batches. A batch is a pure function of the seed and its number."""
