"""What a model is worth: held-out loss by source, samples, questions, CORE, the harness's tasks.

`heldout` sums losses over held-out batches and divides once. `samples` lets the model write.
`classified` tells labels of held-out rows apart, and `classification` says how well.
`questions` scores answers of local files, `core` those of CORE's 22 tasks, and `harness` those of
lm-evaluation-harness. `results` keeps what was answered, and `compared` puts two of them side by
side.
`evaluators` is the table that a run asks by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
