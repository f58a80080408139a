"""What is measured, and how it is shown.

`sums` has metrics as (sum, weight) pairs. `clock` says where time goes. `writers` sends rows to
metrics.jsonl, TensorBoard and the terminal. `sessions` tells the starts of a run apart. `summary`,
`plot`, `page` and `report` make the report of a run.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
