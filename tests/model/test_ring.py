"""Attention over rows that are cut over the mesh axis context, against whole rows.

Its amount of work is counted too. Shapes: B batch, T tokens of a row, c devices that it is cut
over, N heads, K kv heads, H head_dim.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt_jax.model.attention import ring, splash
from gpt_jax.model.attention.attend import attend
from gpt_jax.model.attention.mask import Pattern, make_mask
from gpt_jax.sharding import layout, rows as placing

B = 2
T = 32
N = 4
K = 2
H = 8


def columns(length):
    """Segments that cross the cuts, with padding at the end of one row, and blocks.

    The blocks are prefix-LM and bidirectional.
    """
    third = length // 3
    most = length - 3
    segment = np.array(
        [
            [1] * third + [2] * (third + 1) + [3] * (most - 2 * third - 1) + [0] * 3,
            [1] * (third - 1) + [2] * (length - third + 1),
        ]
    )
    ar = np.array([[0] * third + [1] * (length - third), [1] + [0] * (length - 1)])
    return segment, np.cumsum(ar, 1)


def patterns(length):
    segment, block = columns(length)
    return {
        "causal": Pattern(),
        "window of one": Pattern(1),
        "window within a chunk": Pattern(3),
        "window over chunks": Pattern(length // 3 + 1),
        "segments": Pattern(0, segment),
        "segments and long window": Pattern(length // 3, segment),
        "segments and window": Pattern(7, segment),
        "blocks": Pattern(0, None, block),
        "blocks, segments and window": Pattern(5, segment, block),
    }


PATTERNS = patterns(T)


def inputs(length, kv_heads=K, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((B, length, heads, H)), dtype)
        for heads in (N, kv_heads, kv_heads)
    ]


def whole(q, k, v, pattern, cap):
    jnp_pattern = Pattern(
        pattern.window, *(None if x is None else jnp.asarray(x) for x in pattern[1:])
    )
    return attend(q, k, v, make_mask(jnp_pattern, q.shape[1]), cap)


def cut(mesh, run=ring.ring_attention, rows=("data", "fsdp", "expert"), heads="tensor"):
    """`run` on rows in the mesh's order, cut, with the result put back in the text's order."""

    def shards(q, k, v, pattern, cap):
        def own(q, k, v, *columns):
            return run(q, k, v, Pattern(pattern.window, *columns), cap)

        def column(x):
            return P() if x is None else P(rows, "context")

        arrays = (q, k, v, *pattern[1:])
        spec = P(rows, "context", heads)
        specs = (spec, spec, spec, column(pattern.segment), column(pattern.block))
        places = placing.token_order(q.shape[1], mesh.shape["context"])

        def ordered(x):
            return jax.reshard(jnp.asarray(x), P(rows))[:, places]

        def place(x, spec):
            return None if x is None else jax.reshard(ordered(x), spec)

        out = jax.shard_map(own, in_specs=specs, out_specs=spec, check_vma=False)(
            *map(place, arrays, specs)
        )
        return jax.reshard(out, P(rows, None, heads))[:, np.argsort(places)]

    return shards


def both_ways(run, pattern, cap, args):
    """Output and gradients, for a sum with fixed weights. Padding has no weight."""
    q, k, v = args
    weights = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    if pattern.segment is not None:
        weights = weights * (pattern.segment != 0)[:, :, None, None]

    def loss(q, k, v):
        y = layout.relay(run(q, k, v, pattern, cap), lambda spec: P()) * weights
        return y.sum(), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return y, *grads


@cache
def truth(name, cap, length, kv_heads):
    """`both_ways` of whole rows."""
    run = jax.jit(lambda args: both_ways(whole, patterns(length)[name], cap, args))
    return jax.tree.map(np.asarray, run(inputs(length, kv_heads)))


def compare(mesh, names, cap=0.0, length=T, kv_heads=K, limit=1e-5, **how):
    with jax.set_mesh(mesh):
        found = jax.jit(
            lambda args: {
                name: both_ways(cut(mesh, **how), patterns(length)[name], cap, args)
                for name in names
            }
        )(inputs(length, kv_heads))

    for name in names:
        for ours, theirs in zip(found[name], truth(name, cap, length, kv_heads), strict=True):
            np.testing.assert_allclose(
                ours, theirs, atol=limit * max(1, np.abs(theirs).max()), rtol=0, err_msg=name
            )


# ---- the same values and gradients ---------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces, names",
    [
        (1, ("segments and window",)),
        (2, ("window within a chunk", "segments", "blocks, segments and window")),
        (4, ("window of one", "window over chunks", "blocks")),
        (8, ("causal", "segments and window")),
    ],
)
def test_ring_equals_whole_rows(pieces, names, mesh):
    compare(mesh(context=pieces), names)


def test_ring_in_several_blocks_equals_whole_rows(mesh, monkeypatch):
    monkeypatch.setattr(ring, "BLOCK", 4)
    compare(mesh(context=2), ("segments and window", "blocks, segments and window"))


@pytest.mark.parametrize("kv_heads, cap", [(1, 1.5), (N, 0.0)])
def test_ring_with_other_heads_and_a_soft_cap(kv_heads, cap, mesh):
    compare(mesh(context=2), ("causal",), cap, kv_heads=kv_heads)


def test_ring_beside_other_axes(mesh):
    compare(mesh(context=2, tensor=2, data=2), ("segments and window",))


def test_ring_in_bfloat16(mesh):
    q, k, v = inputs(T, dtype=jnp.bfloat16)
    pattern = PATTERNS["segments and window"]
    line = mesh(context=4)
    with jax.set_mesh(line):
        ours = jax.jit(lambda *x: both_ways(cut(line), pattern, 0.0, x))(q, k, v)
    theirs = jax.jit(partial(both_ways, whole, pattern, 0.0))(
        [x.astype(jnp.float32) for x in (q, k, v)]
    )
    assert ours[1].dtype == jnp.bfloat16
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.float32(our), their, atol=0.02 * np.abs(their).max(), rtol=0)


def test_a_query_that_may_see_nothing_gives_zero_and_finite_gradients(mesh):
    line = mesh(context=2)
    pattern = Pattern(0, np.zeros((B, T), int))

    def loss(*args):
        y = cut(line)(*args, pattern, 0.0)
        return jax.reshard(y, P()).sum(), y

    with jax.set_mesh(line):
        (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs(T))
    assert not y.any() and all(np.isfinite(x).all() for x in grads)


def test_ring_in_scanned_stages_of_a_pipeline(mesh):
    """It runs under vmap over another axis, in a scan of rematerialised layers."""
    square = mesh(context=2, pipeline=2, data=2)
    pattern = PATTERNS["segments"]
    q, k, v = (jnp.stack([x, 2 * x]) for x in inputs(T))

    def layers(run, x, k, v):
        def layer(x, _):
            return x + layout.lay_out_like(run(x, k, v, pattern, 0.0), x), None

        return jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0]

    def loss(run, q, k, v):
        y = jax.vmap(partial(layers, run))(q, k, v)
        return (
            layout.relay(y, lambda spec: P()) * (pattern.segment != 0)[None, :, :, None, None]
        ).sum()

    with jax.set_mesh(square):
        stages = [jax.reshard(x, P("pipeline", "data", "context")) for x in (q, k, v)]
        ours = jax.jit(jax.value_and_grad(partial(loss, cut(square, rows="data")), (0, 1, 2)))(
            *stages
        )
    theirs = jax.value_and_grad(partial(loss, whole), (0, 1, 2))(q, k, v)
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(our, their, atol=1e-5 * np.abs(their).max(), rtol=0)


# ---- the order, and the work ---------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_order_is_a_balanced_permutation(pieces):
    places = placing.token_order(T, pieces)
    assert sorted(places) == list(range(T))
    seen = (places + 1).reshape(pieces, -1).sum(1)  # keys that each device's queries see
    assert len(set(seen)) == 1
    if pieces > 1:
        with pytest.raises(ValueError):
            placing.token_order(T + pieces, pieces)


def equations(jaxpr, times=1):
    """(equation, how often it runs) of a jaxpr and of all inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = (
            times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        )
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from equations(value, inner)


def work(mesh, pattern, run=None):
    """(multiply-adds of one device's matmuls, permutes) of a pass."""
    with jax.set_mesh(mesh):
        found = list(
            equations(
                jax.make_jaxpr(run or (lambda *x: cut(mesh)(*x, pattern, 0.0)))(*inputs(T)).jaxpr
            )
        )
    dots = [
        times
        * equation.outvars[0].aval.size
        * np.prod(
            [equation.invars[0].aval.shape[i] for i in equation.params["dimension_numbers"][0][0]]
        )
        for equation, times in found
        if equation.primitive.name == "dot_general"
    ]

    return sum(dots), sum(
        times for equation, times in found if equation.primitive.name == "ppermute"
    )


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_causal_order_halves_the_work_of_every_step_but_the_own(pieces, mesh):
    half = T // pieces // 2
    # Scores and their product with the values, for half of a device's queries and keys.
    block = 2 * B * N * half**2 * H
    line = mesh(context=pieces)
    assert work(line, Pattern()) == ((3 + 2 * (pieces - 1)) * block, 2 * (pieces - 1))
    assert work(line, PATTERNS["blocks"]) == (4 * pieces * block, 3 * (pieces - 1))
    # The gradient: the forward pass, the scores again and four products; keys as before, and theirs
    # once more home.
    grad = jax.grad(lambda *x: jax.reshard(cut(line)(*x, Pattern(), 0.0), P()).sum(), (0, 1, 2))
    flops, permutes = work(line, None, grad)
    assert flops == (3 + 2 * (pieces - 1)) * block * 7 // 2
    assert permutes == 2 * (pieces - 1) * 2 + 2 * pieces


def test_a_window_leaves_out_the_steps_that_it_cannot_reach(mesh):
    chunk = T // 8 // 2
    steps = ring.schedule(T, 8, chunk, chunk + 1, False)
    assert [step.shift for step in steps] == [0, 1, 6]  # the neighbours on either side
    assert work(mesh(context=8), Pattern(chunk + 1))[1] == 2 * 2
    assert len(ring.schedule(T, 8, chunk, 1, False)) == 1


@pytest.mark.parametrize("window", [0, 1, 5, 9, T])
@pytest.mark.parametrize("both_ways", [False, True])
def test_the_schedule_meets_every_pair_once(window, both_ways):
    pieces = 4
    size = 2
    places = placing.token_order(T, pieces).reshape(pieces, -1, size)
    met = np.zeros((T, T), int)
    source = np.arange(pieces)
    for step in ring.schedule(T, pieces, size, window, both_ways):
        source = (source - step.shift) % pieces
        for device in range(pieces):
            for query, key, apart in step.items[device]:
                if apart != ring.NEVER:
                    ours = places[device, query]
                    theirs = places[source[device], key]
                    assert apart == ours[0] - theirs[0]
                    met[np.ix_(ours, theirs)] += 1
    apart = np.arange(T)[:, None] - np.arange(T)[None, :]
    wanted = (both_ways | (apart >= 0)) & ((apart < window) | (window == 0))

    assert met.max() == 1 and met[wanted].all()


def test_blocks_are_near_their_aim():
    sizes = {chunk: ring.block_size(chunk) for chunk in (12, 1024, 4096, 1500, 3000, 4099)}
    assert sizes == {12: 12, 1024: 1024, 4096: 1024, 1500: 750, 3000: 1000, 4099: 4099}


# ---- whole keys ----------------------------------------------------------------------------------


def test_gather_brings_the_text_back(mesh):
    line = mesh(context=4)
    x = np.arange(B * T).reshape(B, T)
    with jax.set_mesh(line):
        parts = jax.reshard(jnp.asarray(x[:, placing.token_order(T, 4)]), P(None, "context"))
        found = jax.shard_map(
            ring.gather, in_specs=P(None, "context"), out_specs=P(), check_vma=False
        )(parts)
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize(
    "name, cap, length", [("causal", 0.0, 512), ("segments and long window", 2.0, 256)]
)
def test_splash_on_cut_rows_equals_whole_rows(name, cap, length, mesh, monkeypatch):
    """The kernel's own code, with its tables of blocks to skip, runs interpreted on a CPU."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    run = partial(splash.attention, axis="context", interpret=True)
    compare(mesh(context=2, tensor=2), (name,), cap, length, limit=1e-4, run=run)
