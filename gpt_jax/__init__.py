"""GPT-class language models in JAX: one command from a laptop to a pod. Start at README.md."""

import os

import jaxlib.version
import lazy_loader

from gpt_jax.hardware.xla_flags import add_xla_flags

# Some versions of jaxlib compute wrong sums on CPUs without a flag. It has to stand in the
# environment before JAX opens its first device.
XLA_FLAGS = add_xla_flags(os.environ, jaxlib.version.__version__)

# `gpt_jax.load`, `build`, `run_training` and `generate`, each imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
