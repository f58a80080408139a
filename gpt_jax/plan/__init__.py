"""What a run would need, and how fast it could be, on a machine that is not here.

By arithmetic, in a moment: `estimate` reads a `PlanJob` on a `Topology`, and `search` tries many.
By the compiler, in minutes: `compiled` compiles the step that `train` would run, and `program`
reads what it made. `plan` asks both, `lines` and `data` show the answer.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
