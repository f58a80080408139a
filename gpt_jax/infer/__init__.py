"""Text from a model, and how likely a model holds a text.

`decode` turns prompts into text, many rows at a time, with a KV cache; `sampling` draws a token
from logits. `score` sums log-probabilities of given continuations.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
