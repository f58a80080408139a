"""Text from a model: decoding with a KV cache, and sampling.

`sampling` draws a token from logits. `decode` turns prompts into text, many rows at a time.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
