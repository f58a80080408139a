"""One run from start to end.

`parts` makes its parts, `resume` its first state, `loop` trains, `progress` reports, and `notes`
writes the lines before the first step. `lock` keeps a second run out of the workdir. `restore`
opens a checkpoint for evaluation and generation. `python` is what `import gpt_jax` offers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
