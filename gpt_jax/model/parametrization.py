"""How weights start: one table of initialisers by role.

A new parametrisation, such as muP, is one new row of INITS.
"""

import jax
import jax.numpy as jnp
from jax.nn import initializers as inits

from gpt_jax import config

# The roles of weights are embed, position, qkv, attention_out, mlp_in, mlp_out, head, value_embed,
# gate and router. Those of RESIDUAL_OUT write into the residual stream.
RESIDUAL_OUT = ("attention_out", "mlp_out")


def _uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _gpt2(role: str, model: config.Model):
    """Radford et al. 2019: N(0, 0.02), residual projections divided by sqrt(2 layers)."""
    if role in RESIDUAL_OUT:
        return inits.normal(0.02 / (2 * model.layers) ** 0.5)
    return inits.normal(0.02)


def _xavier(role: str, model: config.Model):
    """Glorot & Bengio 2010 for matrices; embeddings N(0, 1 / embed)."""
    if role in ("embed", "position", "value_embed"):
        return inits.normal(model.embed**-0.5)
    return inits.xavier_uniform()


def _modern(role: str, model: config.Model):
    """nanochat's: every block starts as the identity, and the head near zero."""
    # A uniform distribution within this bound has the standard deviation embed^-0.5.
    bound = (3 / model.embed) ** 0.5
    return {
        "embed": inits.normal(0.8),
        "position": inits.normal(0.02),
        "head": inits.normal(0.001),
        "qkv": _uniform(bound),
        "value_embed": _uniform(bound),
        "mlp_in": _uniform(0.4 * bound),
        "router": _uniform(0.4 * bound),
        "attention_out": inits.zeros,
        "mlp_out": inits.zeros,
        "gate": inits.zeros,
    }[role]


INITS = {"gpt2": _gpt2, "xavier": _xavier, "modern": _modern}


def make_init(role: str, model: config.Model):
    """Makes the initialiser `(key, shape, dtype)` of a weight with this role."""
    return INITS[model.init](role, model)


def residual_ramp(first: float, last: float):
    """Makes an initialiser of one scalar a layer, from `first` at layer 0 to `last` at the top."""

    def init(key, shape, dtype=jnp.float32):
        return jnp.linspace(first, last, shape[0], dtype=dtype)

    return init
