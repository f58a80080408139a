"""Text to a corpus, by many workers, restartable at any moment."""
