"""Text in, numpy rows out (floor 1; knows nothing of jax arrays, meshes, hosts or models).

sources (files -> documents) -> split (train, held out) -> tokenizer -> store, cache (token files)
-> rows (columns) -> order (which row comes when) -> pipeline (Grain streams).
"""
