"""Ids to batches: a pure function of the seed and the index of the example."""
