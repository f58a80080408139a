"""What a config can do, checked on a CPU and written on one page.

`shrink` makes a tiny model that keeps every feature of a row. `subject` trains on its text, and
`checks` is the table of what is asked of it. `fits` asks the arithmetic about the row's own shape.
`page` writes what was found as Markdown and as JSON.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
