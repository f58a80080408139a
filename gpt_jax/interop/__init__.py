"""Models of other projects: their directories are opened, checked, read and written.

`families.py` has a table of keys and one of tensors for each family. `architecture.py` turns a
`config.json` into our Model and back. `foreign.py` opens whatever is there, and `export.py` writes
a directory. `weights.py` makes parameters of tensors, wherever these come from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
