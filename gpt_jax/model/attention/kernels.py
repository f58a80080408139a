"""Attention kernels as one table, and the choice among them.

Every kernel honours causal order, windows, segments and `ar` blocks. One that cannot do some of
them says so before anything compiles.

Shapes: B batch, T query, S key, N heads, K kv heads, G = N / K, H head_dim.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.model.attention import flash, ring, splash
from gpt_jax.model.attention.attend import attend, heads_first, weigh
from gpt_jax.model.attention.mask import Pattern, make_mask
from gpt_jax.model.attention.problem import (
    Problem,
    blocked_cannot,
    cudnn_cannot,
    flash_cannot,
    ring_cannot,
    splash_cannot,
    uncut,
    xla_cannot,
)

# ---- the kernels ----


def _reference(q, k, v, pattern, cap, keep):
    return attend(q, k, v, make_mask(pattern, q.shape[1]), cap, keep)


def _reference_weights(q, k, pattern, cap):
    B, T, N, _ = q.shape
    weights = weigh(*heads_first(q, k), make_mask(pattern, T), cap)
    return weights.reshape(B, N, T, T)


def _blocked(q, k, v, pattern, cap, keep):
    """Runs the reference for at most eight runs of queries, one after another.

    Each run looks only at the keys that causal order and the window leave it. This is half the
    work of the whole map, on any platform.
    """
    length = q.shape[1]
    mask = make_mask(pattern, length)
    size = max(64, -(-length // 8))

    parts = []
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        first_key = max(0, start - pattern.window + 1) if pattern.window else 0
        keys = slice(first_key, rows.stop)
        keep_here = None if keep is None else keep[:, :, rows, keys]
        part = attend(q[:, rows], k[:, keys], v[:, keys], mask[:, rows, keys], cap, keep_here)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def _jax_attention(implementation, q, k, v, pattern, cap, keep):
    """Calls jax.nn.dot_product_attention.

    Segments and blocks go in as a mask, because its kernels would ignore them otherwise.
    """
    is_plain = pattern.segment is None and pattern.block is None
    window = (pattern.window - 1, 0) if is_plain and pattern.window else None
    mask = None if is_plain else make_mask(pattern, q.shape[1])[:, None]

    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_plain,
        local_window_size=window,
        implementation=implementation,
    )


def _splash(q, k, v, pattern, cap, keep, interpret=False):
    return splash.attention(q, k, v, pattern, cap, interpret=interpret)


def _flash(q, k, v, pattern, cap, keep, interpret=False):
    return flash.attention(q, k, v, pattern, cap, interpret=interpret)


# What the forward pass of cuDNN's kernel is called. It gives the output and the sums of its
# softmax, and the backward pass needs both.
CUDNN_FORWARD = "dot_product_attention_fwd"
# What kernels with a backward pass of their own call what it needs.
RESULTS = (splash.RESULT, flash.RESULT)
is_named_result = jax.checkpoint_policies.save_only_these_names(*RESULTS)


def is_kernel_result(primitive, *arrays, **params) -> bool:
    """A policy of `jax.checkpoint` that keeps what an attention kernel gives.

    Without it the backward pass would run the kernel a second time.
    """
    return is_cudnn_result(primitive) or is_named_result(primitive, *arrays, **params)


def is_cudnn_result(primitive) -> bool:
    """Whether this is the forward pass of cuDNN's kernel, whose results have no name."""
    return primitive.name.startswith(CUDNN_FORWARD)


# ---- the table, and the choice ----


class Kernel(NamedTuple):
    """A row of KERNELS.

    `run` takes (q, k, v, pattern, cap, keep) and gives [B, T, N, H]. `cannot` takes a Problem and
    gives "", or the reason why the kernel cannot solve it. `platform` is one that the kernel is
    for. `cut` takes (q, k, v, pattern, cap) for rows that are cut over the mesh axis context.
    `weights` takes (q, k, pattern, cap) and gives the map [B, N, T, S] of a kernel that has one.

    The rest is for the plan and for the check at the start of a run. `makes_maps` tells whether
    whole maps of queries and keys exist in memory. `skips_future` tells whether what causal order
    rules out is left out of the FLOPs. `efficiency` is the assumed part of the peak. `keeps_result`
    tells whether `is_kernel_result` knows the kernel. `maps_documents` tells whether documents are
    a map of queries and keys to the kernel, so that it skips nothing in packed rows. `has_cycles`
    tells whether the TPU compiler writes the kernel's cycles. `check_length` is the length of the
    check's rows, for a device along the axis context. `note` follows the reason for the choice.
    """

    run: Callable
    cannot: Callable
    platform: str = "cpu"
    cut: Callable | None = None
    weights: Callable | None = None
    makes_maps: bool = False
    skips_future: bool = True
    efficiency: float = 0.2
    keeps_result: bool = False
    maps_documents: bool = False
    has_cycles: bool = True
    # A kernel that skips blocks gets several of them.
    check_length: int = 256
    note: str = ""


KERNELS = {
    "reference": Kernel(
        _reference, uncut, weights=_reference_weights, makes_maps=True, skips_future=False
    ),
    "blocked": Kernel(_blocked, blocked_cannot),
    "ring": Kernel(_reference, ring_cannot, cut=ring.ring_attention),
    "xla": Kernel(
        partial(_jax_attention, "xla"),
        xla_cannot,
        makes_maps=True,
        skips_future=False,
        check_length=32,
    ),
    "cudnn": Kernel(
        partial(_jax_attention, "cudnn"),
        cudnn_cannot,
        "gpu",
        efficiency=0.55,
        keeps_result=True,
        maps_documents=True,
        has_cycles=False,
        check_length=32,
    ),
    # FlashAttention-2 reaches 0.35 of an H100 (Shah et al. 2024, arXiv:2407.08608). The plan counts
    # 6 matmuls of scores and sums, and this kernel does 9. Nobody has timed it.
    "flash": Kernel(
        _flash,
        flash_cannot,
        "gpu",
        efficiency=0.35 * 6 / 9,
        keeps_result=True,
        has_cycles=False,
        note="flash has not been timed on any GPU",
    ),
    "splash": Kernel(
        _splash,
        splash_cannot,
        "tpu",
        partial(splash.attention, axis="context"),
        efficiency=0.45,
        keeps_result=True,
        has_cycles=False,
    ),
}
PREFERENCE = {
    "cpu": ("blocked", "reference", "ring"),
    "gpu": ("cudnn", "flash", "xla", "reference", "ring"),
    "tpu": ("splash", "xla", "reference", "ring"),
}
# For packed rows. cuDNN takes documents as a map of a row's queries and keys: it computes all of
# the map, and the map's memory grows with the square of the row.
PACKED = {"gpu": ("flash", "cudnn", "xla", "reference", "ring")}


def make_problem(
    model: config.Model,
    dtype: str,
    seq_len: int,
    platform: str,
    ar: bool = False,
    context: int = 1,
    common: bool = False,
    packed: bool = False,
) -> Problem:
    """Describes the attention problem that a model poses on `platform` (cpu, gpu or tpu).

    Rows are cut into `context` pieces. `common` tells whether all segments see some of the keys,
    and `packed` whether documents of a row are kept apart.
    """
    return Problem(
        platform,
        dtype,
        model.head_dim,
        seq_len,
        model.attention_softcap > 0,
        model.attention_dropout > 0,
        ar,
        context,
        common,
        packed,
    )


def choose_kernel(
    name: str, p: Problem, length_ramp: tuple[tuple[int, int], ...] = ()
) -> tuple[str, str]:
    """Chooses a kernel for the problem -> (kernel, reason).

    `auto` takes the first of the platform's PREFERENCE that can solve it, or of PACKED for packed
    rows. Raises UsageError if a named kernel cannot solve the problem, or none can. Raises it also
    if the kernel cannot take a length of `train.length_ramp`: a slower kernel for all rows would be
    dear, and nobody asked.
    """
    kernel, reason = _choose(name, p)
    for i, entry in enumerate(length_ramp):
        fault = KERNELS[kernel].cannot(p._replace(seq_len=entry[1]))
        if fault:
            raise UsageError(
                f"config.train.length_ramp[{i}] = {entry}: {kernel}, the attention kernel of rows "
                f"of {p.seq_len} tokens, {fault}; take another length, or name another kernel in "
                "config.compute.kernel"
            )
    return kernel, reason


def _choose(name: str, p: Problem) -> tuple[str, str]:
    """The kernel for the problem, and the reason, whatever other rows there are."""
    if name != "auto":
        if reason := KERNELS[name].cannot(p):
            raise UsageError(
                f"config.compute.kernel = {name!r}: {reason}; choose auto or another kernel"
            )
        return name, _add_note(name, "asked for")

    order = PREFERENCE.get(p.platform, ("reference",))
    first = f"fastest known on {p.platform}"
    if p.packed and p.platform in PACKED:
        order = PACKED[p.platform]
        first = f"skips other documents of a packed row, unlike {order[1]}"

    passed = []
    for candidate in order:
        reason = KERNELS[candidate].cannot(p)
        if not reason:
            return candidate, _add_note(candidate, "; ".join(passed) or first)
        passed.append(f"{candidate} {reason}")
    raise UsageError(f"config.compute.kernel = 'auto': nothing can do this: {'; '.join(passed)}")


def _add_note(name: str, reason: str) -> str:
    note = KERNELS[name].note
    return f"{reason}; {note}" if note else reason


def attention(name: str, q, k, v, pattern: Pattern, cap: float = 0.0, keep=None):
    """Runs the kernel `name` on each device's own batch rows and heads.

    Shapes are those of `attend`. Raises UsageError if the kernel cannot do what is asked.
    """
    kernel = KERNELS[name]
    pieces = sharding.count_parts("seq")
    problem = Problem(
        kernel.platform,
        q.dtype.name,
        q.shape[-1],
        q.shape[1],
        cap > 0,
        keep is not None,
        pattern.block is not None,
        pieces,
        pattern.common is not None,
        pattern.segment is not None,
    )
    if reason := kernel.cannot(problem):
        raise UsageError(f"config.compute.kernel = {name!r}: {reason}; choose another kernel")

    def run(q, k, v, keep, *columns):
        own = Pattern(pattern.window, *columns)
        if pieces > 1:
            assert kernel.cut is not None, f"{name} accepts cut rows and has no way to run them"
            return kernel.cut(q, k, v, own, cap)
        return kernel.run(q, k, v, own, cap, keep)

    query_axes = ("batch", "seq", "heads", "head_dim")
    key_axes = ("batch", "seq", "kv_heads", "head_dim")

    axes = (
        query_axes,
        key_axes,
        key_axes,
        None if keep is None else ("batch", "heads", "seq", "keys"),
        *axes_of_columns(pattern),
    )
    y = sharding.run_local(run, axes, query_axes)(q, k, v, keep, *pattern[1:])
    # The others mark their result themselves, with what else their backward pass needs.
    return y if kernel.keeps_result else checkpoint_name(y, "attention")


def axes_of_columns(pattern: Pattern) -> list:
    """The logical axes of the pattern's columns, all of which may be None."""
    return [None if column is None else ("batch", "seq") for column in pattern[1:]]


def attention_weights(name: str, q, k, pattern: Pattern, cap: float = 0.0):
    """The attention map [B, N, T, S] of the kernel `name`, which must have one, in float32."""
    weigh = KERNELS[name].weights
    assert weigh is not None, f"{name} has no attention map"

    def run(q, k, *columns):
        return weigh(q, k, Pattern(pattern.window, *columns), cap)

    axes = (
        ("batch", "seq", "heads", "head_dim"),
        ("batch", "seq", "kv_heads", "head_dim"),
        *axes_of_columns(pattern),
    )
    mapped = sharding.run_local(run, axes, ("batch", "heads", "seq", "keys"))
    return mapped(q, k, *pattern[1:])
