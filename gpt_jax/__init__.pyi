from .run.loop import run_training as run_training
from .run.python import (
    build as build,
    generate as generate,
    load as load,
)

XLA_FLAGS: str
