"""The rules of the mesh, the layouts that they give, and the helpers that reshard.

Losses and gradients are in tests/run/test_mesh_matrix.py.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from meshes import BATCH, FSDP, ROWS, close, make_columns, make_model, put, random_params

from gpt_jax.config import find_habits
from gpt_jax.errors import UsageError
from gpt_jax.model.layers.embed import lookup
from gpt_jax.model.transformer import Transformer, abstract_params, init_params
from gpt_jax.sharding import layout, manual, rows as placing, rules
from gpt_jax.sharding.mesh import describe_places, find_unsharded, make_concrete, make_mesh


def test_logits_equal_one_device(mesh):
    """The batch has no position and segment columns. The logits stay split over the vocabulary."""
    model, tokens = make_model("gpt2"), make_columns("gpt2")["tokens"]
    apply = jax.jit(lambda p, b: Transformer(model).apply({"params": p}, b))
    plain = apply(random_params("gpt2"), {"tokens": tokens})
    mesh = mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        ours = apply(
            put(random_params("gpt2"), mesh, model),
            placing.to_devices(mesh, {"tokens": tokens}, ROWS),
        )
    assert ours.sharding.spec == P(BATCH, "context", "tensor")
    close(np.asarray(ours), np.asarray(plain))


def test_fresh_parameters_are_the_same_on_every_mesh(mesh):
    model, key = replace(make_model("modern"), value_embed=False), jax.random.key(5)
    make = jax.jit(lambda key: init_params(model, key))
    plain = make(key)
    with jax.set_mesh(mesh(2, 2, 2)):
        ours = make(key)
        assert jax.tree.map(lambda x: x.sharding.spec, ours) == jax.tree.map(
            lambda x: x.sharding.spec, abstract_params(model)
        )
    jax.tree.map(partial(close, rel=1e-6), ours, plain)


@pytest.mark.parametrize("shape", [dict(data=2), dict(context=2, data=2)])
def test_sums_along_rows_are_those_of_whole_rows(shape):
    """A running sum, as prefixes need it, also where the axis context has one device."""
    ar = np.random.default_rng(0).integers(0, 2, (4, 8))
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])

    def sum_up(x):
        return placing.apply_in_text_order(partial(jnp.cumsum, axis=1), x, "batch", "seq")

    with jax.set_mesh(mesh):
        ours = jax.jit(sum_up)(placing.to_devices(mesh, {"ar": ar}, 4)["ar"])
    order = placing.token_order(8, mesh.shape["context"])
    np.testing.assert_array_equal(ours, ar.cumsum(1)[:, order])


# ---- layouts -------------------------------------------------------------------------------------

GOLDEN = """
blocks/0/attention/k/bias None,tensor
blocks/0/attention/k/kernel None,fsdp+expert+context,tensor
blocks/0/attention/out/bias None,fsdp+expert+context
blocks/0/attention/out/kernel None,tensor,fsdp+expert+context
blocks/0/attention/q/bias None,tensor
blocks/0/attention/q/kernel None,fsdp+expert+context,tensor
blocks/0/attention/v/bias None,tensor
blocks/0/attention/v/kernel None,fsdp+expert+context,tensor
blocks/0/attention/value_embed/table None,tensor,fsdp+expert+context
blocks/0/attention/value_gate/kernel None,None,tensor
blocks/0/mixer_norm/bias None,None
blocks/0/mixer_norm/scale None,None
blocks/0/mlp/down/bias None,fsdp+expert+context
blocks/0/mlp/down/kernel None,tensor,fsdp+expert+context
blocks/0/mlp/up/bias None,tensor
blocks/0/mlp/up/kernel None,fsdp+expert+context,tensor
blocks/0/mlp_norm/bias None,None
blocks/0/mlp_norm/scale None,None
embed/table tensor,fsdp+expert+context
final_norm/bias None
final_norm/scale None
head/kernel fsdp+expert+context,tensor
position/table None,fsdp+expert+context
residual/x None
residual/x0 None
"""


def test_storage_layout(mesh):
    model = replace(
        make_model("gpt2"), layers=1, value_embed=True, residual_scalars=True, tied=False
    )
    with jax.set_mesh(mesh(2, 2, 2)):
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))

    def line(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = ["+".join(p) if isinstance(p, tuple) else str(p) for p in leaf.sharding.spec]
        return f"{name} {','.join(parts)}"

    assert sorted(line(*each) for each in leaves) == GOLDEN.split("\n")[1:-1]


def test_spec_refuses_what_it_does_not_know():
    assert rules.make_spec(rules.STORED, ("layers", "embed", "mlp", None)) == P(
        None, FSDP, "tensor", None
    )
    assert rules.make_spec(rules.USED, ("batch", "seq", "embed")) == P(BATCH, "context", None)
    with pytest.raises(KeyError, match="emebd"):
        rules.make_spec(rules.STORED, ("emebd", "mlp"))
    with pytest.raises(
        KeyError, match="batch"
    ):  # an activation's axis is no axis of a stored weight
        rules.make_spec(rules.STORED, ("batch", "mlp"))

    pair = rules.STORED | {"rows": ("data", "fsdp")}
    for table, axes in ((rules.STORED, ("mlp", "heads")), (pair, ("rows", "embed"))):
        with pytest.raises(ValueError, match="use a mesh axis twice"):
            rules.make_spec(table, axes)


def test_make_mesh_counts_devices():
    assert dict(make_mesh({"fsdp": 4, "tensor": 2}).shape) == {
        "pipeline": 1,
        "data": 1,
        "fsdp": 4,
        "expert": 1,
        "context": 1,
        "tensor": 2,
    }
    with pytest.raises(UsageError, match="needs 4 devices, there are 8"):
        make_mesh({"data": 4})


def test_make_mesh_keeps_slices_together():
    """There are two slices of four devices.

    An axis across them steps from one to the other, and all other axes stay inside.
    """
    shape, devices = {"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8]
    grid = np.vectorize(lambda device: device.id)(
        make_mesh(shape, devices, {"data": 2}).devices
    ).reshape(2, 2, 2)
    assert [set(part.ravel()) for part in grid] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    grid = np.vectorize(lambda device: device.id)(
        make_mesh(shape, devices, {"fsdp": 2}).devices
    ).reshape(2, 2, 2)
    assert [set(part.ravel()) for part in grid.swapaxes(0, 1)] == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_places_of_a_process():
    mesh = make_mesh({"data": 2, "tensor": 4}, jax.devices()[:8])
    assert describe_places(mesh, jax.devices()[:4]) == "data 0, tensor 0-3"
    assert describe_places(mesh, [jax.devices()[i] for i in (1, 3, 5, 7)]) == "data 0-1, tensor 1,3"
    assert describe_places(mesh) == "data 0-1, tensor 0-3"


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_order_gives_every_device_an_early_and_a_late_chunk(pieces):
    found = placing.token_order(16, pieces)
    assert sorted(found) == list(range(16))
    assert {int(part.sum()) for part in np.split(found, pieces)} == {120 // pieces}


def test_helpers_are_the_identity_without_a_mesh():
    x = jnp.arange(12.0).reshape(3, 4)
    assert (
        layout.constrain(x, "batch", "embed") is x
        and layout.use_weight(x, ("embed", "mlp"), jnp.float32) is x
    )
    assert rules.out_spec("batch", None) is None and rules.axis_size("tensor") == 1
    assert manual.run_local(len, ((None,),), ()) is len
    np.testing.assert_array_equal(layout.reshape(x, (2, 6), None, None), x.reshape(2, 6))


def test_unsharded_names_large_replicated_leaves(mesh):
    mesh = mesh(2, 2, 2)

    def place(spec, *shape):
        return jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, spec))

    tree = {
        "a": {
            "whole": place(P(), 8, 8),
            "split": place(P(None, "tensor"), 8, 8),
            "small": place(P(), 8),
        },
        "one": place(P("expert"), 8, 8),
    }
    assert find_unsharded(tree, mesh, 256) == {
        "no axis is laid over it": [("a/whole", 256)],
        "laid over expert, of size 1 on this mesh": [("one", 256)],
    }
    assert find_unsharded(tree, mesh, 257) == find_unsharded(tree, mesh) == {}
    one = make_mesh({}, jax.devices()[:1])
    assert (
        find_unsharded({"x": jax.device_put(np.zeros((512, 512)), NamedSharding(one, P()))}, one)
        == {}
    )


def test_concrete_gives_every_leaf_a_layout(mesh):
    mesh, model = mesh(2, 2, 2), make_model("gpt2")
    with jax.set_mesh(mesh):
        found = make_concrete(
            {"params": abstract_params(model), "step": jax.ShapeDtypeStruct((), jnp.int32)}, mesh
        )
    assert found["step"].sharding == NamedSharding(mesh, P())
    assert found["params"]["embed"]["table"].sharding == NamedSharding(mesh, P("tensor", FSDP))


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_to_devices_lays_rows_over_data_and_fsdp(shape, mesh):
    mesh, column = mesh(*shape), np.arange(ROWS * 3).reshape(ROWS, 3)
    assert placing.process_rows(mesh, ROWS) == slice(0, ROWS)
    made = placing.to_devices(mesh, {"x": column}, ROWS)["x"]
    np.testing.assert_array_equal(made, column)
    assert made.sharding == NamedSharding(mesh, rules.batch_spec())
    assert {s.data.shape for s in made.addressable_shards} == {(ROWS // (shape[0] * shape[1]), 3)}


@pytest.mark.parametrize(
    "held, wanted",
    [([(4, 6), (6, 8)], slice(4, 8)), ([(4, 8), (4, 8)], slice(4, 8)), ([(0, 2), (4, 6)], None)],
)
def test_process_rows_are_contiguous_or_refused(held, wanted, mesh, monkeypatch):
    """A process is shown that owns only some of the devices."""

    class Fake:
        def __init__(self, mesh, spec):
            pass

        def addressable_devices_indices_map(self, shape):
            return {n: (slice(*rows),) for n, rows in enumerate(held)}

    monkeypatch.setattr(placing, "NamedSharding", Fake)
    if wanted:
        assert placing.process_rows(mesh(2, 2, 2), 8) == wanted
    else:
        with pytest.raises(
            UsageError,
            match=r"not contiguous; put config\.mesh\.tensor and config\.mesh\.context inside",
        ):
            placing.process_rows(mesh(2, 2, 2), 8)


# ---- single helpers on a mesh --------------------------------------------------------------------


@pytest.mark.parametrize("way", ["tables", "columns"])
def test_lookup_over_a_sharded_vocabulary(mesh, way):
    """Tokens of one row come from every shard, and some come many times."""
    rng, mesh = np.random.default_rng(2), mesh(1, 2, 4)
    table, weights = (np.float32(rng.standard_normal(shape)) for shape in ((16, 4), (8, 9, 4)))
    tokens = rng.integers(0, 16, (8, 9))
    tokens[:, :4] = [0, 15, 3, 3]

    def loss(table, tokens):
        found = lookup(table, tokens, jnp.float32, way)
        return (found * weights).sum(), found

    with jax.set_mesh(mesh):
        stored = jax.device_put(table, NamedSharding(mesh, P("tensor", FSDP)))
        columns = placing.to_devices(mesh, {"tokens": tokens}, 8)
        (_, found), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            stored, columns["tokens"]
        )
    theirs = np.zeros_like(table)
    np.add.at(theirs, tokens, weights)
    np.testing.assert_array_equal(found, table[tokens])
    np.testing.assert_allclose(grad, theirs, atol=1e-5)
    assert grad.sharding.spec == P("tensor", FSDP)


def test_reshape_and_local(mesh):
    x = np.arange(8 * 4 * 6, dtype=np.float32).reshape(8, 4, 6)

    @jax.jit
    def moved(x):
        x = layout.constrain(x, "batch", "seq", "heads")
        split = layout.reshape(x, (8, 4, 2, 3), "batch", "seq", "heads", "head_dim")
        doubled = manual.run_local(
            lambda y, none: y * 2 + (none is None),
            (("batch", "seq", "heads", "head_dim"), None),
            ("batch", "seq", "heads", "head_dim"),
        )(split, None)
        pair = manual.run_local(
            lambda y: (y, y[:, 0]),
            (("batch", "seq", "heads"),),
            (("batch", "seq", "heads"), ("batch", "heads")),
        )(x)

        return split, doubled, *pair

    with jax.set_mesh(mesh(2, 2, 2)):
        split, doubled, same, first = moved(x)
    for ours, theirs in (
        (split, x.reshape(8, 4, 2, 3)),
        (doubled, 2 * x.reshape(8, 4, 2, 3) + 1),
        (same, x),
        (first, x[:, 0]),
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert split.sharding.spec == doubled.sharding.spec == P(BATCH, "context", "tensor", None)
    assert first.sharding.spec == P(BATCH, "tensor")


@pytest.mark.parametrize(
    "platform, dim, kept", [("gpu", 1, True), ("gpu", 0, False), ("cpu", 1, False)]
)
def test_gathered_weights_keep_their_layout_on_gpus(platform, dim, kept, mesh, monkeypatch):
    """So does the gradient, where the dim that is gathered is not the outermost."""
    monkeypatch.setattr(layout, "habits", lambda: find_habits(platform))
    grid, weight = mesh(fsdp=8), jnp.arange(64.0 * 16).reshape(64, 16)
    stored = P(*("fsdp" if i == dim else None for i in range(2)))
    gather = jax.shard_map(
        lambda w: layout.gather(w, ("fsdp",), dim),
        in_specs=stored,
        out_specs=P(),
        check_vma=False,
    )

    with jax.set_mesh(grid):
        placed = jax.device_put(weight, NamedSharding(grid, stored))
        both = jax.jit(jax.value_and_grad(lambda w: (gather(w) ** 2).sum()))
        assert str(jax.make_jaxpr(both)(placed)).count("layout_constraint") == 2 * kept
        np.testing.assert_array_equal(jax.jit(gather)(placed), weight)


@pytest.mark.parametrize(
    "shape, is_partial", [((1, 1, 1), False), ((1, 1, 2), False), ((2,), True)]
)
def test_a_gradient_is_partial_where_rows_are_cut(mesh, shape, is_partial):
    """Elsewhere the weight is multiplied in the form that is fast on a CPU."""
    with jax.set_mesh(mesh(*shape)):
        weight = layout.sum_gradient_once(jnp.ones((8, 4)))
        assert layout.has_partial_gradient(weight) == is_partial
