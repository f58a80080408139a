"""`sharding.using_rules` is not in the key of a cached trace, so no trace may be cached under it.

JAX caches the traces of jitted functions, of scan bodies and of custom gradients. Here the same
model is traced under several rules, in one order and in the other. Each trace must be the one that
comes out of empty caches. It names the layout of every array.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from meshes import make_config

from gpt_jax import sharding
from gpt_jax.model.kv_cache import make_cache
from gpt_jax.model.transformer import Transformer, abstract_params

ROWS = 4
LENGTH = 16


def make_traces(name: str, mesh) -> dict:
    """Functions that trace one model with the same shapes: the way of training, and of decoding."""
    settings = make_config(name, shard_sequence=True)
    model = settings.model
    compute = settings.compute
    module = Transformer(model, compute)
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def train(params, tokens, lengths):
        return module.apply({"params": params}, {"tokens": tokens}, method="features")[0]

    def gradient(params, tokens, lengths):
        return jax.grad(lambda params: train(params, tokens, lengths).sum())(params)

    def decode(params, tokens, lengths):
        cache = make_cache(model, compute, ROWS, LENGTH)
        batch = {"tokens": tokens}
        return module.apply({"params": params}, batch, cache, lengths, method="step")[0]

    def trace(function) -> str:
        with jax.set_mesh(mesh):
            jaxpr = jax.make_jaxpr(function)(abstract_params(model), tokens, lengths)
        return re.sub(r"0x[0-9a-f]+", "", str(jaxpr))

    return {f.__name__: lambda f=f: trace(f) for f in (train, gradient, decode)}


@pytest.mark.parametrize("name", ["gpt2", "moe"])
def test_a_trace_does_not_depend_on_what_was_traced_before(name, mesh):
    traces = make_traces(name, mesh(fsdp=2, tensor=2))
    alone = {}
    for way, trace in traces.items():
        jax.clear_caches()
        alone[way] = trace()
    assert len(set(alone.values())) == len(alone)

    for order in (list(traces), list(reversed(traces))):
        jax.clear_caches()
        for way in order:
            assert traces[way]() == alone[way], f"{way} in the order {order}"


def test_a_trace_that_is_cached_under_rules_would_be_seen(mesh):
    """The danger itself: a jitted function that lives longer than the rules it was traced under."""
    inner = jax.jit(lambda x: sharding.constrain(x, "batch", "seq"))

    def trace(rules) -> str:
        def outer(x):
            with sharding.using_rules(rules):
                return inner(x)

        with jax.set_mesh(mesh(fsdp=2, context=2)):
            return str(jax.make_jaxpr(outer)(jnp.zeros((ROWS, LENGTH))))

    first = trace({})
    wrong = trace(sharding.WHOLE_ROWS)
    jax.clear_caches()
    right = trace(sharding.WHOLE_ROWS)
    assert first == wrong != right
