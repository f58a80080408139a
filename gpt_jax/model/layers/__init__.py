"""Parts of a layer: matmuls, norms, embeddings, positions, feed-forward."""
