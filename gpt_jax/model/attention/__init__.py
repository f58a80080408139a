"""Attention: the layer, its kernels, its masks and its KV cache."""
