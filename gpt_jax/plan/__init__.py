"""What a run would need and how fast it could be, on hardware that is not here (floor 3; called by
commands/plan.py).

Two ways to know. By arithmetic, in a moment: memory.py, traffic.py and roofline.py read a `Job`
(job.py) on a `Topology`; search.py tries many. From the compiler, in minutes: compiled.py compiles
the very step that `train` would run and hlo.py reads the program.
"""
