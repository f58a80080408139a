"""Models of other projects: their directories are opened, checked, read and written.

`families.py` has a table of keys and one of tensors for each family. `architecture.py` turns a
`config.json` into our Model and back. `tensors.py` reads safetensors files, `weights.py` makes
parameters of them, and `directory.py` opens a whole directory.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
