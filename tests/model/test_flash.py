"""Flash attention for GPUs against `reference`, interpreted on a CPU, and what a GPU would run.

Interpreted, the kernel's own code runs with the blocks that it skips. Its programs are also lowered
for a GPU, and compiled for cards that are not here where JAX's compiler for them is installed.
Shapes: B batch, T tokens of a row, N heads, K kv heads, H head_dim.
"""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from programs import list_equations, trace_layers

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.model.attention import flash, kernels
from gpt_jax.model.attention.conformance import find_limit, measure_conformance
from gpt_jax.model.attention.flash_kernels import Blocks
from gpt_jax.model.attention.kernels import KERNELS, Problem, choose_kernel
from gpt_jax.model.attention.mask import Pattern, make_mask
from gpt_jax.plan import targets

ROOT = Path(__file__).resolve().parents[2]
RUN = partial(kernels._flash, interpret=True)
B = 2


def draw(length: int, heads: int, kv_heads: int, head_dim: int, dtype="float32"):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((B, length, n, head_dim)), dtype)
        for n in (heads, kv_heads, kv_heads)
    ]


def draw_segment(length: int):
    """Documents of two rows: a few, and many short ones. The second row ends in padding."""
    rng = np.random.default_rng(1)
    rows = [np.cumsum(rng.random(length) < rate) + 1 for rate in (0.01, 0.05)]
    rows[1][-length // 5 :] = 0
    return jnp.asarray(np.stack(rows), jnp.int32)


def measure(run, pattern, cap, q, k, v):
    """Output and gradients. Padding is wanted of nobody."""
    pull = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    if pattern.segment is not None:
        pull = jnp.where(pattern.segment[:, :, None, None] == 0, 0, pull)

    def weigh(q, k, v):
        out = run(q, k, v, pattern, cap, None).astype(jnp.float32) * pull
        return out.sum(), out

    return jax.grad(weigh, (0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize(
    "length, heads, kv_heads, head_dim, window, is_packed, cap",
    [
        (300, 2, 2, 64, 0, False, 0.0),  # It is filled up to 384.
        (256, 4, 2, 64, 0, True, 0.0),
        (300, 4, 2, 128, 70, True, 2.0),
        (384, 3, 1, 16, 1, False, 0.0),
        (100, 2, 1, 256, 0, True, 3.0),
    ],
)
def test_equals_reference(length, heads, kv_heads, head_dim, window, is_packed, cap):
    pattern = Pattern(window, draw_segment(length) if is_packed else None)
    arrays = draw(length, heads, kv_heads, head_dim)
    ours, wanted = (
        jax.jit(partial(measure, run, pattern, cap))(*arrays)
        for run in (RUN, KERNELS["reference"].run)
    )
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        # With a window of one, queries and keys have no gradient.
        np.testing.assert_allclose(our, their, atol=1e-5 * max(1, np.abs(their).max()), rtol=0)


def test_padding_is_finite():
    q, k, v = draw(256, 2, 1, 16)
    segment = jnp.zeros((B, 256), jnp.int32).at[0, :10].set(1)
    out = RUN(q, k, v, Pattern(0, segment), 0.0, None)
    assert np.isfinite(out).all()


# ---- the blocks that are skipped -----------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize("order", ["rising", "any", "none"])
@pytest.mark.parametrize("blocks", [Blocks(32, 16, 4), Blocks(16, 32, 4)])
def test_bounds_leave_out_no_key(window, order, blocks):
    """What a query may see is within the bounds. If documents are in order, they are tight."""
    length = 128
    segment = None
    if order != "none":
        segment = draw_segment(length)
    if order == "any":
        segment = jax.random.permutation(jax.random.key(0), segment, axis=1)

    first, end = flash.list_bounds(segment, length, window, blocks)
    # To the kernel padding is a document.
    documents = None if segment is None else segment + 1
    mask = np.asarray(make_mask(Pattern(window, documents), length))
    rows = mask.shape[0]
    seen = mask.reshape(rows, length // blocks.queries, blocks.queries, -1, blocks.keys)
    seen = seen.any((2, 4))

    wanted_first = seen.argmax(2)
    wanted_end = seen.shape[1] - seen[:, ::-1].argmax(1)
    assert (first <= wanted_first).all() and (end >= wanted_end).all()
    if order != "any":
        np.testing.assert_array_equal(first, wanted_first)
        np.testing.assert_array_equal(end, wanted_end)


def test_keys_of_other_documents_are_not_read():
    """A key that is no number is never multiplied, not even by a weight of 0."""
    q, k, v = draw(512, 2, 1, 64)
    segment = jnp.asarray(np.repeat([[1] * 256 + [2] * 256], B, 0), jnp.int32)
    spoilt = v.at[:, :256].set(jnp.nan)
    out = RUN(q, k, spoilt, Pattern(0, segment), 0.0, None)
    assert np.isnan(out[:, :256]).all() and np.isfinite(out[:, 256:]).all()


# ---- the table -----------------------------------------------------------------------------------


def pose(**changes) -> Problem:
    plain = dict(
        platform="gpu",
        dtype="bfloat16",
        head_dim=64,
        seq_len=1024,
        softcap=False,
        dropout=False,
        ar=False,
    )
    return Problem(**plain | changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(platform="cpu"), "needs a GPU, this is cpu"),
        (dict(dropout=True), "no attention dropout"),
        (dict(ar=True), "no ar blocks"),
        (dict(head_dim=96), "needs a head_dim of 16, 32, 64, 128, 256"),
        (dict(context=2), "needs whole rows"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, words):
    with pytest.raises(UsageError, match=rf"config\.compute\.kernel = 'flash': .*{words}.*"):
        choose_kernel("flash", pose(**changes))


def test_a_jax_without_triton_has_no_flash(monkeypatch):
    monkeypatch.setattr(flash, "has_triton", lambda: False)
    with pytest.raises(UsageError, match="needs Pallas's Triton backend"):
        choose_kernel("flash", pose())
    name, reason = choose_kernel("auto", pose(packed=True))
    assert name == "cudnn" and "Triton" in reason


@pytest.mark.parametrize(
    "changes, wanted, words",
    [
        ({}, "cudnn", "fastest known on gpu"),
        (dict(packed=True), "flash", "skips other documents of a packed row, unlike cudnn"),
        (dict(packed=True, head_dim=96), "cudnn", "flash needs a head_dim"),
        (dict(packed=True, platform="tpu"), "splash", "fastest known on tpu"),
        (dict(softcap=True), "flash", "cudnn has no soft-cap"),
        (dict(softcap=True, head_dim=96), "reference", "flash needs a head_dim"),
    ],
)
def test_auto_takes_it_for_packed_rows_and_soft_caps(changes, wanted, words):
    name, reason = choose_kernel("auto", pose(**changes))
    assert name == wanted and words in reason
    assert ("has not been timed" in reason) == (wanted == "flash")


def make_model(**changes) -> config.Model:
    model = config.Model(embed=64, heads=4, kv_heads=2, vocab=8, **changes)
    return config.resolve(config.Config(model=model)).model


@pytest.mark.parametrize("dtype, segments", [("float32", True), ("bfloat16", False)])
def test_it_passes_the_check_of_a_run(dtype, segments, mesh, monkeypatch):
    """The check runs with rows and heads on several devices."""
    monkeypatch.setitem(KERNELS, "flash", KERNELS["flash"]._replace(run=RUN))
    model = make_model(windows=(100,), attention_softcap=5.0)
    limit = 1e-5 if dtype == "float32" else find_limit(dtype, "cpu")
    with jax.set_mesh(mesh(2, 1, 2)):
        assert max(measure_conformance("flash", model, dtype, segments, rows=2)) < limit


def count_kernels(remat: str, *save: str) -> int:
    """How often a program of the kernel stands in the gradient of a model's layers."""
    compute = config.Compute(dtype="bfloat16", kernel="flash", remat=remat, remat_save=save)
    equations = trace_layers(make_model(layers=2, max_seq=128), compute)
    return Counter(equation.primitive.name for equation in equations)["pallas_call"]


def test_it_runs_once_if_its_result_is_kept():
    """Its forward pass stands in the program once, as without remat, or twice."""
    plain = count_kernels("none")
    assert plain == count_kernels("dots") == count_kernels("names", "attention") == 3
    assert count_kernels("block") == count_kernels("names", "attention_out") == 4


# ---- what a GPU would run ------------------------------------------------------------------------


def make_gradient(pattern, cap):
    def weigh(q, k, v):
        return flash.attention(q, k, v, pattern, cap).astype(jnp.float32).sum()

    return jax.jit(jax.grad(weigh, (0, 1, 2)))


def test_a_gradient_makes_no_map():
    """No array has a query for each key, and every kernel stands in the program once."""
    arrays = draw(1024, 2, 1, 64, "bfloat16")
    gradient = make_gradient(Pattern(100, draw_segment(1024)), 3.0)
    equations = [*list_equations(jax.make_jaxpr(gradient)(*arrays).jaxpr)]
    counts = Counter(equation.primitive.name for equation in equations)
    assert counts["pallas_call"] == 3
    outside = [x.aval for e in equations for x in e.outvars]
    assert not [x for x in outside if getattr(x, "shape", ()).count(1024) > 1]


def test_a_gradient_is_lowered_for_a_gpu():
    """Triton accepts each program. This needs neither a GPU nor a compiler for one."""
    arrays = draw(512, 4, 2, 64, "bfloat16")
    gradient = make_gradient(Pattern(100, draw_segment(512)), 3.0)
    # JAX 0.12 asks for a card.
    card = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=card)):
        text = gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    for program in ("flash_forward", "flash_backward_queries", "flash_backward_keys"):
        assert program in text


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install 'jax[cuda13]'"
)
def test_a_gradient_compiles_for_cards_that_are_not_here():
    """Each program uses tensor cores, and fits into the shared memory of a block."""
    command = [sys.executable, ROOT / "benchmarks/flash_programs.py", "--print", "--head_dims=64"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert {row["card"] for row in rows} == {"h100", "b200"}
    for row in rows:
        assert len(row["programs"]) == 3
        for figures in row["programs"].values():
            assert figures["has_tensor_cores"]
            assert figures["shared"] <= targets.LIMITS["shared_memory_per_block_optin"]
