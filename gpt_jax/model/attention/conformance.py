"""The check of the chosen attention kernel, which a run makes before its first step.

A tiny packed batch goes through the kernel and through the reference. Values and gradients must
agree, because a step needs both, and kernels have a backward pass of their own.

Shapes: B batch, T tokens of a row, N heads, K kv heads, H head_dim.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.model.attention.kernels import KERNELS, Kernel, attention
from gpt_jax.model.attention.mask import Pattern

# How a platform multiplies float32 by default, and under a jax_default_matmul_precision.
PRODUCTS = {"cpu": "float32", "gpu": "tf32", "tpu": "bfloat16"}
PRECISIONS = {
    "float32": "float32",
    "highest": "float32",
    "high": "tf32",
    "tensorfloat32": "tf32",
    "bfloat16_3x": "tf32",
}
# The largest error that sound kernels may have, relative to the largest value. TF32 keeps 10 bits
# of a factor and bfloat16 keeps 7. The sums and the softmax are float32 with each of them.
LIMITS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 3e-2}


class Case(NamedTuple):
    """What is checked, and what its outcome depends on.

    `mesh`, `precision` and the rows of KERNELS are here so that others make another case.
    """

    name: str
    kernel: Kernel
    reference: Kernel
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    softcap: float
    dtype: str
    segments: bool
    rows: int
    mesh: jax.sharding.Mesh
    precision: str | None


class Errors(NamedTuple):
    """The largest differences from the reference, relative to its largest values."""

    values: float
    gradients: float  # of queries, keys and values


def find_limit(dtype: str, platform: str) -> float:
    """The largest error that a kernel may have with inputs of `dtype` on `platform`."""
    if dtype != "float32":
        return LIMITS["bfloat16"]
    return LIMITS[PRECISIONS.get(_find_precision() or "", PRODUCTS.get(platform, "bfloat16"))]


def _find_precision() -> str | None:
    # Options are attributes that no checker sees.
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def find_largest(values: list[float]) -> float:
    """The largest value, or nan if there is one. Python's own max would pass over a nan."""
    return float(np.max(values))


def measure_conformance(
    name: str, model: config.Model, dtype: str, segments: bool, rows: int
) -> Errors:
    """Returns the largest errors of kernel `name`, relative to the largest of `reference`.

    Both run on a tiny packed batch, on the devices of the current mesh. `rows` counts its rows. It
    must be a multiple of `sharding.count_parts("batch")`. A process measures a case once, however
    many runs it makes.

    Raises UsageError if an error is too large. With `segments` it also raises if a change to the
    first document of a row changes the second in the slightest, or if the first document gets a
    gradient from the second.
    """
    length = KERNELS[name].check_length * sharding.count_parts("seq")
    case = Case(
        name=name,
        kernel=KERNELS[name],
        reference=KERNELS["reference"],
        length=length,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        # The windows are short enough to matter.
        windows=tuple(sorted({min(window, length // 4) for window in model.windows})),
        softcap=model.attention_softcap,
        dtype=dtype,
        segments=segments,
        rows=rows,
        mesh=jax.sharding.get_mesh(),
        precision=_find_precision(),
    )
    return _measure(case)


@lru_cache(maxsize=64)
def _measure(case: Case) -> Errors:
    rng = np.random.default_rng(0)

    def draw(heads):
        shape = (case.rows, case.length, heads, case.head_dim)
        return jnp.asarray(rng.standard_normal(shape), case.dtype)

    q = draw(case.heads)
    k = draw(case.kv_heads)
    v = draw(case.kv_heads)
    pull = draw(case.heads)  # the gradient of the result

    segment = None
    if case.segments:
        documents = [1] * (case.length // 2) + [2] * (case.length // 2)
        segment = jnp.asarray(np.repeat([documents], case.rows, 0))
    run = _make_runner(case.softcap, segment)

    pairs = [
        (run(case.name, window, q, k, v, pull), run("reference", window, q, k, v, pull))
        for window in case.windows
    ]
    errors = Errors(
        find_largest([_relative_difference(ours[0], wanted[0]) for ours, wanted in pairs]),
        find_largest([_relative_difference(ours[1], wanted[1]) for ours, wanted in pairs]),
    )
    limit = find_limit(case.dtype, next(iter(pairs[0][0][0].devices())).platform)
    _check_errors(case.name, errors, limit)
    if case.segments:
        _check_leaks(case.name, partial(run, case.name, case.windows[0]), q, k, v, pull)
    return errors


def _check_errors(name: str, errors: Errors, limit: float) -> None:
    """Raises UsageError if an error is larger than `limit`, or is no number."""
    for what, error in (("", errors.values), ("in its gradients ", errors.gradients)):
        if not error <= limit:
            raise UsageError(
                f"config.compute.kernel = {name!r}: differs from reference {what}by {error:.1e} on "
                f"this machine (limit {limit:.0e}); choose another kernel"
            )


def _check_leaks(name: str, run: Callable, q, k, v, pull) -> None:
    """Raises UsageError if the documents of a row see each other, forwards or backwards."""
    half = q.shape[1] // 2
    is_first = jnp.arange(q.shape[1])[None, :, None, None] < half

    clean, _ = run(q, k, v, pull)
    dirty, _ = run(q, k, jnp.where(is_first, v + 100, v), pull)
    # Nothing is wanted of the first document, so its keys and values have no gradient.
    _, (_, d_k, d_v) = run(q, k, v, jnp.where(is_first, 0, pull))
    leaks = (clean[:, half:] != dirty[:, half:], d_k[:, :half] != 0, d_v[:, :half] != 0)
    if any(bool(leak.any()) for leak in leaks):
        raise UsageError(
            f"config.compute.kernel = {name!r}: lets a document see the one before it in a "
            "packed row; choose another kernel"
        )


def _make_runner(softcap: float, segment) -> Callable:
    """Makes run(kernel, window, q, k, v, pull) -> (out, (d_q, d_k, d_v)).

    All arrays are in the order of the text. `pull` is the gradient of `out`.
    """

    def place(x, axis):
        return sharding.constrain(sharding.reorder(x), "batch", "seq", axis, "head_dim")

    def attend(kernel, window, q, k, v):
        column = None
        if segment is not None:
            column = sharding.constrain(sharding.reorder(segment), "batch", "seq")
        q = place(q, "heads")
        k = place(k, "kv_heads")
        v = place(v, "kv_heads")

        out = attention(kernel, q, k, v, Pattern(window, column), softcap)
        out = sharding.constrain(out, "batch", None, "heads", "head_dim")
        return sharding.reorder(out, back=True)

    @partial(jax.jit, static_argnums=(0, 1))
    def run(kernel, window, q, k, v, pull):
        def weigh(q, k, v):
            out = attend(kernel, window, q, k, v)
            pulled = out.astype(jnp.float32) * sharding.lay_out_like(pull, out)
            return pulled.sum(), out

        # The reference wants whole rows.
        own_rules = sharding.WHOLE_ROWS if kernel == "reference" else {}
        with sharding.using_rules(own_rules):
            gradients, out = jax.grad(weigh, (0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    return run


def _relative_difference(ours, reference) -> float:
    """The largest difference between two trees of arrays, each array by its own largest value."""
    return find_largest(jax.tree.leaves(_compare(ours, reference)))


@jax.jit
def _compare(ours, reference):
    def compare(ours, reference):
        ours = ours.astype(jnp.float32)
        reference = reference.astype(jnp.float32)
        return jnp.max(jnp.abs(ours - reference)) / jnp.max(jnp.abs(reference))

    return jax.tree.map(compare, ours, reference)
