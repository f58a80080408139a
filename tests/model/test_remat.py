"""Remat by names: what is kept under a name is not computed again, and all else is.

Programs are read as JAX traces them, so neither an accelerator nor a compiler is needed.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import make_columns, make_config, put, random_params
from programs import list_matmuls, trace_layers

from gpt_jax import config, sharding
from gpt_jax.model.attention import kernels
from gpt_jax.model.remat import REMATS
from gpt_jax.run import parts

MODELS = {
    "dense": dict(pattern=(("attention", "swiglu"),)),
    "post": dict(norm_position="post"),
    "blocks": dict(pattern=(("attention", "moe"),), experts=4, shared_experts=1),
    "capacity": dict(pattern=(("attention", "moe"),), experts=4, dispatch="capacity"),
}


def make_model(name: str) -> config.Model:
    model = config.Model(layers=2, embed=32, heads=4, vocab=48, max_seq=128, **MODELS[name])
    return config.resolve(config.Config(model=model)).model


def trace_gradient(name: str, kernel: str = "reference", **knobs) -> list:
    compute = config.Compute(dtype="bfloat16", kernel=kernel, **knobs)
    return trace_layers(make_model(name), compute)


def count_matmuls(name: str, *save: str, remat: str = "names") -> int:
    return len(list_matmuls(trace_gradient(name, remat=remat, remat_save=save)))


# Matmuls that a kept value spares the backward pass. On a CPU q, k and v are one matmul, and so are
# up and gate. A block of experts has three, and a row of them with a capacity two.
SPARED = [
    ("dense", ("q", "k", "v"), 1),
    ("dense", ("attention",), 1),
    ("dense", ("attention_out",), 1),
    ("dense", ("mlp_in",), 1),
    ("dense", ("mlp_in", "attention_out", "q", "k", "v"), 3),
    ("dense", ("q", "k"), 0),  # v needs the joined matmul.
    ("dense", ("mlp_hidden",), 0),  # The gradient of the activation needs what comes in.
    ("post", ("mlp_out",), 1),
    ("blocks", ("mlp_in",), 1),
    ("blocks", ("experts_out",), 3),
    ("capacity", ("experts_out",), 1),
]


@pytest.mark.parametrize("name, save, spared", SPARED)
def test_a_kept_value_is_not_computed_again(name, save, spared):
    assert count_matmuls(name, *save) == count_matmuls(name, remat="block") - spared


@pytest.mark.parametrize("name", MODELS)
def test_every_name_is_marked(name):
    """A model marks the names that the config offers for it, and no others."""
    marks = {
        equation.params["name"]
        for equation in trace_gradient(name, remat="block")
        if equation.primitive.name == "name"
    }
    assert marks == {*config.list_marked(make_model(name))}


def test_all_names_are_in_the_table():
    marked = {mark for name in MODELS for mark in config.list_marked(make_model(name))}
    assert marked == {*config.REMAT_NAMES}


def count_kernels(**knobs) -> int:
    equations = trace_gradient("dense", "splash", **knobs)
    return Counter(equation.primitive.name for equation in equations)["pallas_call"]


def test_splash_runs_once_if_its_result_is_kept():
    plain = count_kernels()
    assert count_kernels(remat="names", remat_save=("attention",)) == plain > 0
    assert count_kernels(remat="names", remat_save=("attention_out",)) == plain + 1


def test_cudnn_has_no_names_and_is_known_by_its_primitive():
    class Primitive:
        name = f"{kernels.CUDNN_FORWARD}_wrapper"

    def ask(save=(), offload=()):
        compute = config.Compute(remat="names", remat_save=save, remat_offload=offload)
        policy = REMATS["names"](compute)
        assert policy is not None
        return policy(Primitive)

    assert ask(save=("attention",)) is True
    assert ask(save=("q",), offload=("attention_out",)) is False
    assert ask(offload=("attention",)).dst == sharding.HOST


@pytest.mark.parametrize(
    "lists",
    [
        dict(remat_save=("experts_in", "experts_out", "mlp_in")),
        dict(remat_save=("q", "k", "v"), remat_offload=("layer_in", "experts_out", "attention")),
    ],
)
def test_gradients_on_a_mesh_are_those_without_remat(lists):
    """Experts lie over devices, so that their names are inside a function of one device."""
    mesh = sharding.make_mesh({"fsdp": 2, "expert": 2}, jax.devices()[:4])
    columns = {key: jnp.asarray(x) for key, x in make_columns("moe").items()}

    def compute_gradient(**knobs):
        settings = make_config("moe", **knobs)
        network = parts.make_network(settings.model, settings.compute)

        def loss(params):
            hidden, _ = network.features(params, batch, None)
            return jnp.square(hidden).mean()

        with jax.set_mesh(mesh):
            place = jax.sharding.NamedSharding(mesh, sharding.batch_spec())
            batch = jax.device_put(columns, place)
            params = put(random_params("moe"), mesh, settings.model)
            return jax.jit(jax.grad(loss))(params)

    plain = compute_gradient()
    for ours, theirs in zip(
        jax.tree.leaves(compute_gradient(remat="names", **lists)),
        jax.tree.leaves(plain),
        strict=True,
    ):
        scale = max(np.abs(theirs).max(), 1e-6)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale)
