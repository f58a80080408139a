"""One device and eight give one answer: logits, losses, gradients and updates on several meshes; and the rules.

The reference of every comparison runs without a mesh, in one microbatch, with all logits at once.
"""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.model.layers import lookup
from gpt_jax.model.transformer import Transformer, abstract_params, init_params
from gpt_jax.train.loss import Network
from gpt_jax.train.step import init_state, train_step

ROWS, LENGTH, VOCAB, STEPS = 16, 8, 48, 20
TRAIN = config.Train(seq_len=LENGTH, batch_size=ROWS, z_loss=1e-3, label_smoothing=0.1)
MODELS = {
    "gpt2": dict(layers=2, windows=(3,)),  # on packed rows
    "modern": dict(layers=3, kv_heads=4, norm="plain_rmsnorm", position="rotary", embed_norm=True, tied=False,
                   bias=False, pattern=(("attention", "swiglu"),), qk_norm=True, qk_norm_after_rope=True,
                   logit_softcap=15.0, value_embed=True, residual_scalars=True, smear=True, smear_gate=5, backout=True, dropout=0.1, attention_dropout=0.1,
                   init="modern")}
MESHES = {  # (data, fsdp, tensor), microbatches, tokens of a row whose logits exist at once
    "gpt2": [((8, 1, 1), 2, 0), ((1, 8, 1), 1, 4), ((1, 1, 8), 1, 0), ((2, 2, 2), 4, 2)],
    "modern": [((1, 8, 1), 1, 0), ((2, 2, 2), 1, 0), ((1, 2, 4), 1, 4)]}
CASES = [(name, *case) for name, cases in MESHES.items() for case in cases]
CASE_IDS = [f"{name}-{'x'.join(map(str, shape))}-{k}-{chunk}" for name, shape, k, chunk in CASES]


def make_model(name) -> config.Model:
    model = config.Model(**dict(embed=32, heads=8, vocab=VOCAB, kernel="reference") | MODELS[name])
    return config.resolve(config.Config(model=model, train=TRAIN)).model


def random_params(name):
    """Normal draws in numpy: the same on every mesh, and no zeros that would hide a wrong sum."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(0.2 * rng.standard_normal(x.shape)), abstract_params(make_model(name)))


def make_columns(name):
    """Packed rows with segments and positions for gpt2, plain ones for modern; some rows learn much, some little."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1))
    weight = (rng.random((ROWS, LENGTH)) < rng.random((ROWS, 1))).astype(np.float32)
    out = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weight": weight,
           "bytes": rng.integers(1, 5, (ROWS, LENGTH))}
    if name == "gpt2":
        half = LENGTH // 2
        out |= {"segment": np.tile([1] * half + [2] * half, (ROWS, 1)),
                "position": np.tile([*range(half)] * 2, (ROWS, 1))}
    return out


def run(name, columns, place, train):
    """Per-step metrics of STEPS updates, the first gradient (Adam's momentum gives it away) and the last state."""
    module, key = Transformer(make_model(name)), jax.random.key(3)
    rngs = lambda key: {} if key is None else {"dropout": key}
    network = Network(lambda p, b, key: module.apply({"params": p}, b, method="features", rngs=rngs(key)),
                      lambda p, hidden: module.apply({"params": p}, hidden, method="unembed"))
    tx = optax.adamw(1e-3, b1=0.5, eps=1e-6)  # neither lifts rounding noise much
    state = init_state(place(random_params(name)), tx, train)
    step = jax.jit(partial(train_step, network=network, tx=tx, train=train))
    sums, first = [], None
    for _ in range(STEPS):
        state, now = step(state, columns, key)
        sums.append({name: float(a) / float(b) for name, (a, b) in now.items()})
        first = jax.tree.map(lambda m: np.asarray(m) / 0.5, state.opt[0].mu) if first is None else first
    return sums, first, state


@lru_cache(maxsize=None)
def alone(name):
    sums, first, state = run(name, make_columns(name), lambda p: p, TRAIN)
    return sums, first, jax.tree.map(np.asarray, state.params)


def put(params, mesh, name):
    """Numpy parameters laid out as the model would make them on `mesh`."""
    return jax.tree.map(lambda x, like: jax.device_put(x, NamedSharding(mesh, like.sharding.spec)), params,
                        abstract_params(make_model(name)))


def close(ours, theirs, rel=1e-5, floor=0.0):
    """To `rel` of the largest entry, or of `floor`: the key biases' gradient is zero but for rounding."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * max(np.abs(theirs).max(), floor))


@pytest.mark.parametrize("name, shape, accumulate, chunk", CASES, ids=CASE_IDS)
def test_mesh_equals_one_device(name, shape, accumulate, chunk, mesh):
    mesh = mesh(*shape)
    with jax.set_mesh(mesh):
        columns = sharding.to_devices(mesh, make_columns(name), ROWS)
        train = replace(TRAIN, accumulate=accumulate, loss_chunk=chunk)
        sums, first, state = run(name, columns, lambda p: put(p, mesh, name), train)
        specs = jax.tree.map(lambda x: x.sharding.spec, abstract_params(make_model(name)))
    plain_sums, plain_first, plain_params = alone(name)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain_first))
    for ours, theirs in zip(jax.tree.leaves(first), jax.tree.leaves(plain_first)):
        close(ours, theirs, rel=3e-5, floor=1e-3 * largest)
    for now, plain in zip(sums, plain_sums, strict=True):
        for key, value in now.items():
            assert value == pytest.approx(plain[key], rel=1e-4 if key == "grad_norm" else 1e-5)
    assert sums[-1]["loss"] < 0.95 * sums[0]["loss"]  # it did train
    jax.tree.map(partial(close, rel=1e-3), jax.tree.map(np.asarray, state.params), plain_params)
    for tree in (state.params, state.opt[0].mu, state.opt[0].nu):  # nothing has been gathered on the way
        assert jax.tree.map(lambda x: x.sharding.spec, tree) == specs


def test_logits_equal_one_device(mesh):
    """Without position and segment columns; the logits stay split over the vocabulary."""
    model, tokens = make_model("gpt2"), make_columns("gpt2")["tokens"]
    apply = jax.jit(lambda p, b: Transformer(model).apply({"params": p}, b))
    plain = apply(random_params("gpt2"), {"tokens": tokens})
    mesh = mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        ours = apply(put(random_params("gpt2"), mesh, "gpt2"), sharding.to_devices(mesh, {"tokens": tokens}, ROWS))
    assert ours.sharding.spec == P(("data", "fsdp"), None, "tensor")
    close(np.asarray(ours), np.asarray(plain))


def test_fresh_parameters_are_the_same_on_every_mesh(mesh):
    model, key = replace(make_model("modern"), value_embed=False), jax.random.key(5)
    make = jax.jit(lambda key: init_params(model, key))
    plain = make(key)
    with jax.set_mesh(mesh(2, 2, 2)):
        ours = make(key)
        assert jax.tree.map(lambda x: x.sharding.spec, ours) == jax.tree.map(lambda x: x.sharding.spec,
                                                                            abstract_params(model))
    jax.tree.map(partial(close, rel=1e-6), ours, plain)


# ---- layouts -------------------------------------------------------------------------------------

GOLDEN = """
blocks/0/attention/k/bias None,tensor
blocks/0/attention/k/kernel None,fsdp,tensor
blocks/0/attention/out/bias None,fsdp
blocks/0/attention/out/kernel None,tensor,fsdp
blocks/0/attention/q/bias None,tensor
blocks/0/attention/q/kernel None,fsdp,tensor
blocks/0/attention/v/bias None,tensor
blocks/0/attention/v/kernel None,fsdp,tensor
blocks/0/attention/value_embed/table None,tensor,fsdp
blocks/0/attention/value_gate/kernel None,None,tensor
blocks/0/mixer_norm/bias None,None
blocks/0/mixer_norm/scale None,None
blocks/0/mlp/down/bias None,fsdp
blocks/0/mlp/down/kernel None,tensor,fsdp
blocks/0/mlp/up/bias None,tensor
blocks/0/mlp/up/kernel None,fsdp,tensor
blocks/0/mlp_norm/bias None,None
blocks/0/mlp_norm/scale None,None
embed/table tensor,fsdp
final_norm/bias None
final_norm/scale None
head/kernel fsdp,tensor
position/table None,fsdp
residual/x None
residual/x0 None
"""


def test_storage_layout(mesh):
    model = replace(make_model("gpt2"), layers=1, value_embed=True, residual_scalars=True, tied=False)
    with jax.set_mesh(mesh(2, 2, 2)):
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    found = [f"{jax.tree_util.keystr(path, simple=True, separator='/')} {','.join(map(str, leaf.sharding.spec))}"
             for path, leaf in leaves]
    assert sorted(found) == GOLDEN.split("\n")[1:-1]


def test_spec_refuses_what_it_does_not_know():
    assert sharding.spec(sharding.STORED, ("layers", "embed", "mlp", None)) == P(None, "fsdp", "tensor", None)
    assert sharding.spec(sharding.USED, ("batch", "seq", "embed")) == P(("data", "fsdp"), None, None)
    with pytest.raises(KeyError, match="emebd"):
        sharding.spec(sharding.STORED, ("emebd", "mlp"))
    with pytest.raises(KeyError, match="batch"):  # an activation's axis is no axis of a stored weight
        sharding.spec(sharding.STORED, ("batch", "mlp"))
    pair = sharding.STORED | {"rows": ("data", "fsdp")}
    for table, axes in ((sharding.STORED, ("mlp", "heads")), (pair, ("rows", "embed"))):
        with pytest.raises(ValueError, match="use a mesh axis twice"):
            sharding.spec(table, axes)


def test_make_mesh_counts_devices():
    assert dict(sharding.make_mesh({"fsdp": 4, "tensor": 2}).shape) == {
        "pipeline": 1, "data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    with pytest.raises(UsageError, match="needs 4 devices, there are 8"):
        sharding.make_mesh({"data": 4})


def test_helpers_are_the_identity_without_a_mesh():
    x = jnp.arange(12.0).reshape(3, 4)
    assert sharding.constrain(x, "batch", "embed") is x and sharding.use(x, ("embed", "mlp"), jnp.float32) is x
    assert sharding.out("batch", None) is None and sharding.axis_size("tensor") == 1
    assert sharding.local(len, ((None,),), ()) is len and sharding.spread(x) is x
    np.testing.assert_array_equal(sharding.reshape(x, (2, 6), None, None), x.reshape(2, 6))


def test_unsharded_names_large_replicated_leaves(mesh):
    mesh = mesh(2, 2, 2)
    place = lambda spec, *shape: jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, spec))
    tree = {"a": {"whole": place(P(), 8, 8), "split": place(P(None, "tensor"), 8, 8), "small": place(P(), 8)}}
    assert sharding.unsharded(tree, 256) == ["a/whole"]
    assert sharding.unsharded(tree, 257) == sharding.unsharded(tree) == []
    assert sharding.unsharded({"one device": jnp.zeros((512, 512))}) == []


def test_concrete_gives_every_leaf_a_layout(mesh):
    mesh, model = mesh(2, 2, 2), make_model("gpt2")
    with jax.set_mesh(mesh):
        found = sharding.concrete({"params": abstract_params(model), "step": jax.ShapeDtypeStruct((), jnp.int32)}, mesh)
    assert found["step"].sharding == NamedSharding(mesh, P())
    assert found["params"]["embed"]["table"].sharding == NamedSharding(mesh, P("tensor", "fsdp"))


# ---- batches -------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_to_devices_lays_rows_over_data_and_fsdp(shape, mesh):
    mesh, column = mesh(*shape), np.arange(ROWS * 3).reshape(ROWS, 3)
    assert sharding.process_rows(mesh, ROWS) == slice(0, ROWS)
    made = sharding.to_devices(mesh, {"x": column}, ROWS)["x"]
    np.testing.assert_array_equal(made, column)
    assert made.sharding == NamedSharding(mesh, sharding.batch_spec())
    assert {s.data.shape for s in made.addressable_shards} == {(ROWS // (shape[0] * shape[1]), 3)}


@pytest.mark.parametrize("held, wanted", [([(4, 6), (6, 8)], slice(4, 8)), ([(4, 8), (4, 8)], slice(4, 8)),
                                          ([(0, 2), (4, 6)], None)])
def test_process_rows_are_contiguous_or_refused(held, wanted, mesh, monkeypatch):
    """As a process sees it that owns only some of the devices."""
    class Fake:
        def __init__(self, mesh, spec):
            pass

        def addressable_devices_indices_map(self, shape):
            return {n: (slice(*rows),) for n, rows in enumerate(held)}

    monkeypatch.setattr(sharding, "NamedSharding", Fake)
    if wanted:
        assert sharding.process_rows(mesh(2, 2, 2), 8) == wanted
    else:
        with pytest.raises(UsageError, match="not contiguous; put config.mesh.tensor inside a process"):
            sharding.process_rows(mesh(2, 2, 2), 8)


# ---- single helpers on a mesh --------------------------------------------------------------------

def test_lookup_over_a_sharded_vocabulary(mesh):
    """Values and gradients; tokens of one row come from every shard, and some come many times."""
    rng, mesh = np.random.default_rng(2), mesh(1, 2, 4)
    table, weights = (np.float32(rng.standard_normal(shape)) for shape in ((16, 4), (8, 9, 4)))
    tokens = rng.integers(0, 16, (8, 9))
    tokens[:, :4] = [0, 15, 3, 3]

    def loss(table, tokens):
        found = lookup(table, tokens)
        return (found * weights).sum(), found

    with jax.set_mesh(mesh):
        stored = jax.device_put(table, NamedSharding(mesh, P("tensor", "fsdp")))
        columns = sharding.to_devices(mesh, {"tokens": tokens}, 8)
        (_, found), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(stored, columns["tokens"])
    theirs = np.zeros_like(table)
    np.add.at(theirs, tokens, weights)
    np.testing.assert_array_equal(found, table[tokens])
    np.testing.assert_allclose(grad, theirs, atol=1e-5)
    assert grad.sharding.spec == P("tensor", "fsdp")


def test_reshape_local_and_spread(mesh):
    x = np.arange(8 * 4 * 6, dtype=np.float32).reshape(8, 4, 6)

    @jax.jit
    def moved(x):
        x = sharding.constrain(x, "batch", "seq", "heads")
        split = sharding.reshape(x, (8, 4, 2, 3), "batch", "seq", "heads", "head_dim")
        doubled = sharding.local(lambda y, none: y * 2 + (none is None), (("batch", "seq", "heads", "head_dim"), None),
                                 ("batch", "seq", "heads", "head_dim"))(split, None)
        pair = sharding.local(lambda y: (y, y[:, 0]), (("batch", "seq", "heads"),),
                              (("batch", "seq", "heads"), ("batch", "heads")))(x)
        return split, doubled, *pair, sharding.spread(x)

    with jax.set_mesh(mesh(2, 2, 2)):
        split, doubled, same, first, spread = moved(x)
    for ours, theirs in ((split, x.reshape(8, 4, 2, 3)), (doubled, 2 * x.reshape(8, 4, 2, 3) + 1), (same, x),
                         (first, x[:, 0]), (spread, x)):
        np.testing.assert_array_equal(ours, theirs)
    batch = ("data", "fsdp")
    assert split.sharding.spec == doubled.sharding.spec == P(batch, None, "tensor", None)
    assert first.sharding.spec == P(batch, "tensor")
    assert {s.data.shape for s in spread.addressable_shards} == {(1, 4, 6)}
