"""The train step and what it keeps: objectives, optimisers, schedules and checkpoints.

This room knows no model. A `Network` holds the model's pure functions.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
