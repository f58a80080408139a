"""Maps to and from heads multiply with and without a dim for the heads, and give one answer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import trace

from gpt_jax import config, sharding
from gpt_jax.model.layers.linear import Weights, project

MODEL = config.resolve(
    config.Config(model=config.Model(embed=32, heads=4, head_dim=8, vocab=16))
).model
WIDE = dict(dtype="bfloat16", reduce_dtype="float32")


class ThroughHeads(nn.Module):
    """Sends x [B, T, D] to queries and keys with biases, and their product back to [B, T, D]."""

    compute: config.Compute

    @nn.compact
    def __call__(self, x):
        def map_to(features, axes, role, name):
            return Weights(features, axes, role, MODEL, self.compute, True, name=name)

        q = map_to(32, ("embed", "heads"), "qkv", "q")
        k = map_to(32, ("embed", "kv_heads"), "qkv", "k")
        out = map_to(32, ("heads", "embed"), "attention_out", "out")
        q, k = project(x, q, k)
        return project(q * k, out)[0]


def find_gradients(compute: config.Compute, x, params):
    module = ThroughHeads(compute)

    def measure(params, x):
        x = sharding.constrain(x, "batch", compute.stream, None)
        return (module.apply({"params": params}, x).astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.value_and_grad(measure, (0, 1)))(params, x)


def draw_inputs(compute: config.Compute):
    x = jax.random.normal(jax.random.key(0), (4, 8, 32), compute.dtype)
    shapes = jax.eval_shape(ThroughHeads(compute).init, jax.random.key(1), x)["params"]
    rng = np.random.default_rng(0)
    return x, jax.tree.map(lambda p: jnp.float32(rng.standard_normal(p.shape) / 4), shapes)


def split_heads(monkeypatch, multiple: int):
    row = config.find_habits("tpu")._replace(split_heads=multiple)
    monkeypatch.setattr(sharding, "habits", lambda: row)


@pytest.mark.parametrize("shape", [{}, dict(fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("knobs", [{}, dict(shard_sequence=True), WIDE], ids=str)
def test_a_dim_for_the_heads_changes_no_result(shape, knobs, mesh, monkeypatch):
    compute = config.Compute(**knobs)
    x, params = draw_inputs(compute)
    answers = []
    for multiple in (0, 8):
        split_heads(monkeypatch, multiple)
        if shape:
            with jax.set_mesh(mesh(**shape)):
                answers.append(find_gradients(compute, x, params))
        else:
            answers.append(find_gradients(compute, x, params))

    rough = 1e-5 if compute.dtype == "float32" else 2e-2
    for plain, split in zip(*map(jax.tree.leaves, answers), strict=True):
        largest = np.abs(np.float32(plain)).max()
        np.testing.assert_allclose(np.float32(split), np.float32(plain), atol=rough * largest)


@pytest.mark.parametrize("multiple, dims", [(8, {4}), (16, {2}), (0, {2})])
def test_only_heads_of_a_fitting_width_get_a_dim(multiple, dims, monkeypatch):
    split_heads(monkeypatch, multiple)
    x, params = draw_inputs(config.Compute())
    module = ThroughHeads(config.Compute())
    equations = trace(lambda x: module.apply({"params": params}, x), x)
    matmuls = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert {max(v.aval.ndim for v in (*e.invars, *e.outvars)) for e in matmuls} == dims
