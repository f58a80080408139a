"""The processes of a job: how they start, meet, agree, and end.

`launch_local`, `launch_slurm` and `launch_kubernetes` start processes, or write what an engine
needs to start them. `messages`, `rendezvous` and `join` make one job of them. `agree` compares what
they were given, and `signals` and `job` end them together. `code` says which code each process
runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
