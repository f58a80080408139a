"""One run from start to end.

`build` makes its parts, `resume` its first state, `loop` trains, `progress` reports, and `restore`
opens a checkpoint for evaluation and generation.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
