"""What a model is worth: held-out loss by source, samples, questions, and the harness's tasks.

`heldout` sums losses over held-out batches and divides once. `samples` lets the model write.
`questions` scores answers of local files, and `harness` those of lm-evaluation-harness.
`evaluators` is the table that a run asks by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
