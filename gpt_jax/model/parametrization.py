"""How weights start: one table, so that a new parametrisation (muP and its kin) is one row
(called by model/)."""

import jax
import jax.numpy as jnp
from jax.nn import initializers as inits

from gpt_jax import config

# Roles: embed, position, qkv, attention_out, mlp_in, mlp_out, head, value_embed, gate, router.
RESIDUAL_OUT = ("attention_out", "mlp_out")


def _uniform(bound):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def _gpt2(role: str, model: config.Model):
    """Radford et al. 2019: N(0, 0.02), residual projections divided by sqrt(2 layers)."""
    return inits.normal(0.02 / (2 * model.layers) ** 0.5 if role in RESIDUAL_OUT else 0.02)


def _xavier(role: str, model: config.Model):
    """Glorot & Bengio 2010 for matrices; embeddings N(0, 1 / embed)."""
    return (
        inits.normal(model.embed**-0.5)
        if role in ("embed", "position", "value_embed")
        else inits.xavier_uniform()
    )


def _modern(role: str, model: config.Model):
    """nanochat's: every block starts as the identity, and the head near zero."""
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
    """The initialiser `(key, shape, dtype)` of a weight with this role."""
    return INITS[model.init](role, model)


def residual_ramp(first: float, last: float):
    """One scalar per layer, from `first` at layer 0 to `last` at the top."""
    return lambda key, shape, dtype=jnp.float32: jnp.linspace(first, last, shape[0], dtype=dtype)
