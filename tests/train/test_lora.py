"""Adapters: applied = merged = a plain reference, on any mesh, and what is refused."""

import zlib
from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest
from meshes import close, make_columns, make_config, put, random_params
from small_configs import refuses

from gpt_jax import config
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.model.transformer import abstract_params
from gpt_jax.run.parts import make_network
from gpt_jax.sharding import rows
from gpt_jax.train import lora, step
from gpt_jax.train.optim.groups import leaves_by_path

# It has two layers that are scanned, and one behind them.
MODEL = "tail"
LORA = config.Lora(rank=3, alpha=6.0)
VARIANTS = {
    "lora": LORA,
    "rslora": replace(LORA, variant="rslora", targets=("attention/[qv]/", "mlp/down")),
    "dora": replace(LORA, variant="dora"),
    "dropout": replace(LORA, variant="dora", dropout=0.3),
}


def random_adapters(knobs, params):
    """Adapters whose every entry does something. The values are the same on every mesh."""
    like = jax.eval_shape(
        lambda params: lora.init_adapters(knobs, params, describe_parameter, jax.random.key(0)),
        params,
    )

    def draw(keys, leaf):
        path = jax.tree_util.keystr(keys)
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        values = np.float32(0.3 * rng.standard_normal(leaf.shape))
        return np.abs(values) + 0.5 if path.endswith("['m']") else values

    return jax.tree_util.tree_map_with_path(draw, like), like


def measure(knobs, mesh=None, name=MODEL, seed=None, **compute):
    """(gradient of the adapters, Sums) of one batch. Without a `seed` nothing is dropped."""
    key = None if seed is None else jax.random.key(seed)
    settings = make_config(name, **compute)
    network = lora.add_adapters(make_network(settings.model, settings.compute), knobs)
    columns = make_columns(name)
    params = random_params(name)
    adapters, _ = random_adapters(knobs, params)
    grad = jax.jit(partial(step.gradients, network, train=settings.train))
    if mesh is None:
        return grad(adapters, {lora.BASE: params}, columns, key)
    with jax.set_mesh(mesh):
        params = put(params, mesh, settings.model)
        _, like = random_adapters(knobs, abstract_params(settings.model))
        adapters = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.sharding.NamedSharding(mesh, like.sharding.spec)),
            adapters,
            like,
        )
        batch = rows.to_devices(mesh, columns, len(columns["tokens"]))
        return grad(adapters, {lora.BASE: params}, batch, key)


alone = cache(measure)


def compare(ours, theirs, rel=1e-5):
    for name, (total, _) in theirs[1].items():
        close(ours[1][name][0], total, rel)
    jax.tree.map(
        partial(close, rel=rel, floor=1e-4),
        *map(partial(jax.tree.map, np.asarray), (ours[0], theirs[0])),
    )


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_applied_is_merged(variant):
    """The layers add what adapters make of activations; merged weights are a plain model's."""
    knobs = VARIANTS[variant]
    settings = make_config(MODEL)
    network = make_network(settings.model, settings.compute)
    params = random_params(MODEL)
    adapters, _ = random_adapters(knobs, params)
    objective = partial(
        step.OBJECTIVES["next_token"], network, train=settings.train, frozen={}, key=None
    )

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def measure_merged(adapters):
        merged = lora.merge_adapters(knobs, adapters, params)
        sums = objective(params=merged, batch=make_columns(MODEL))
        return sums["objective"][0] / sums["objective"][1], sums

    grads, sums = measure_merged(adapters)
    ours = alone(knobs)
    if variant == "dora":
        # The lengths of columns count as constants where the layers apply an adapter.
        keep = {"m"}
        grads, own = (
            {path: x for path, x in leaves_by_path(tree).items() if path[-1] in keep}
            for tree in (grads, ours[0])
        )
        ours = own, ours[1]
    compare(ours, (grads, sums), 2e-5)


MESHES = {
    "split": (dict(data=2, fsdp=2, tensor=2), dict(shard_sequence=True, seed=5), "dropout"),
    "ring": (dict(context=2, fsdp=2, tensor=2), dict(kernel="ring", seed=5, accumulate=2), "lora"),
    "stages": (dict(pipeline=2, fsdp=2, data=2), {}, "rslora"),
}


@pytest.mark.parametrize("case", ["split", pytest.param("ring", marks=pytest.mark.deep), "stages"])
def test_one_device_and_eight_agree(mesh, case):
    shape, knobs, variant = MESHES[case]
    # Stages have equal numbers of layers.
    name = "gpt2" if case == "stages" else MODEL
    seed = 5 if variant == "dropout" else None
    reference = alone(VARIANTS[variant], name=name, seed=seed)
    compare(measure(VARIANTS[variant], mesh(**shape), name, **knobs), reference, 3e-5)


def test_a_loop_of_layers_and_a_scan_agree():
    knobs = VARIANTS["dora"]
    compare(measure(knobs, unroll=1), alone(knobs))


def test_dropout_is_for_training_alone():
    """Evaluation has no key, and drops nothing."""
    knobs = VARIANTS["dropout"]
    compare(alone(knobs), alone(VARIANTS["dora"]))
    dropped = alone(knobs, name=MODEL, seed=5)[1]["loss"][0]
    assert abs(dropped - alone(VARIANTS["dora"])[1]["loss"][0]) > 1e-2


def test_dora_is_its_formula():
    """W' = m (W + s A B) / |W + s A B|, column by column (arXiv:2402.09353, equation 5)."""
    knobs = VARIANTS["dora"]
    params = random_params(MODEL)
    adapters, _ = random_adapters(knobs, params)
    merged = leaves_by_path(lora.merge_adapters(knobs, adapters, params))
    parts = leaves_by_path(adapters)
    paths = {path.rpartition("/")[0] for path in parts}
    assert len(paths) == 14
    for path, old in leaves_by_path(params).items():
        if path not in paths:
            assert merged[path] is old
            continue
        a, b, m = (np.float64(parts[f"{path}/{part}"]) for part in "abm")
        for at in np.ndindex(old.shape[:-2]):
            moved = old[at] + 6.0 / 3 * np.einsum("ir,ro->io", a[at], b[at])
            wanted = np.stack(
                [m[at][j] * column / np.linalg.norm(column) for j, column in enumerate(moved.T)], 1
            )
            np.testing.assert_allclose(merged[path][at], wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("variant, scale", [("lora", 4.0), ("rslora", 8.0), ("dora", 4.0)])
def test_scales(variant, scale):
    assert lora.find_scale(config.Lora(rank=4, alpha=16.0, variant=variant)) == scale


def test_adapters_start_from_nothing():
    """Their values depend on the path alone, and the model is the base to the bit."""
    params = random_params(MODEL)

    def init(*targets):
        knobs = replace(LORA, targets=targets)
        make = partial(lora.init_adapters, knobs, describe=describe_parameter)
        return leaves_by_path(make(params=params, key=jax.random.key(1)))

    every = init("matrix")
    some = init("attention/q/kernel")
    assert len(some) == 2 * 2 and len(every) == 2 * 14
    for path, leaf in some.items():
        np.testing.assert_array_equal(leaf, every[path])
    assert len({np.asarray(x).tobytes() for path, x in every.items() if path[-1] == "a"}) == 14

    base = every["blocks/0/attention/q/kernel/a"]
    assert base.shape == (2, 32, 3) and 0.9 < np.abs(base).max() * np.sqrt(32) <= 1
    adapters = lora.init_adapters(LORA, params, describe_parameter, jax.random.key(1))
    merged = lora.merge_adapters(LORA, adapters, params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(targets=("matrx",)), ("config.lora.targets[0] = 'matrx'", "its roles are", "matrix")),
        (dict(targets=("matrix", "norm")), ("targets[1] = 'norm'", "have no adapters")),
        (dict(targets=("(",)), ("neither a role nor a regular expression",)),
        (dict(rank=17), ("config.lora.rank = 17", "32 x 16", "at most 16")),
    ],
)
def test_refusals(knobs, words):
    like = random_params(MODEL)
    refuses(lambda: lora.find_matrices(replace(LORA, **knobs), like, describe_parameter), *words)


def test_the_optimiser_sees_adapters():
    """They are described by the matrices beneath them, and Muon leaves them to AdamW."""
    describe = lora.describe_adapters(describe_parameter)
    assert describe("blocks/0/attention/q/kernel/a") == ("adapter", True)
    assert describe("tail/0/mlp/up/kernel/b") == ("adapter", False)
