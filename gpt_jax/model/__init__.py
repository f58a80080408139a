"""The transformer as a pure function.

`transformer` is the whole and scans its layers, `stages` runs them as a pipeline, and `layers/`,
`attention/` and `experts/` are the parts. Variants are rows of tables. Each file explains its shape
letters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
