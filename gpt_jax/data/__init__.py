"""Text in, numpy batches out. This room knows no jax arrays, meshes or models.

`read` turns files into documents. `tokenizers` turns documents into ids. `tokens` keeps ids on disk
and reads them by place. `prepare` makes a corpus of many files, with many workers. `stream` turns
ids into batches: order, packing, mixture, and the Grain pipeline that prefetches them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
