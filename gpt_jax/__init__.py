"""GPT-class language models in JAX: one command from a laptop to a pod. Start at README.md."""
