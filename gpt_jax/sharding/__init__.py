"""Where arrays lie on a mesh.

Weights have two layouts. They are stored split over `fsdp` (ZeRO-3, Rajbhandari et al. 2020,
arXiv:1910.02054), and used split over `tensor` alone (Shoeybi et al. 2019, arXiv:1909.08053).

`mesh` makes meshes, `rules` maps logical axes to mesh axes, and `layout` moves arrays between
layouts. `memory` moves arrays between devices and their hosts. `manual` runs code on each device,
and `rows` lays batches out. Meshes have explicit axis types, so a wrong layout is an error while
tracing. Without a mesh every function here but those of `memory` is the identity.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
