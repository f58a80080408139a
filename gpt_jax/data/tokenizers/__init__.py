"""Text to ids and back: bytes, characters, BPE, and tokenizer files of other tools."""
