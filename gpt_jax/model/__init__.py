"""The transformer as a pure function.

`transformer` is the whole, `stack` and `stages` run its layers, `layers/`, `attention/` and
`experts/` are the parts. Variants are rows of tables. Shape letters are explained in each file.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
