"""GPT-class language models in JAX: one command from a laptop to a pod. Start at README.md."""

import os

import jaxlib

from gpt_jax.hardware.xla_flags import add_xla_flags

# Some versions of jaxlib compute wrong sums on CPUs without a flag. It has to stand in the
# environment before JAX opens its first device.
add_xla_flags(os.environ, jaxlib.__version__)
