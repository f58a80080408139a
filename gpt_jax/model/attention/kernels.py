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
from gpt_jax.model.attention import ring, splash
from gpt_jax.model.attention.attend import attend, heads_first, weigh
from gpt_jax.model.attention.mask import Pattern, make_mask

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


# What the forward pass of cuDNN's kernel is called. It gives the output and the sums of its
# softmax, and the backward pass needs both.
CUDNN_FORWARD = "dot_product_attention_fwd"
is_named_result = jax.checkpoint_policies.save_only_these_names(splash.RESULT)


def is_kernel_result(primitive, *arrays, **params) -> bool:
    """A policy of `jax.checkpoint` that keeps what an attention kernel gives.

    Without it the backward pass would run the kernel a second time.
    """
    return is_cudnn_result(primitive) or is_named_result(primitive, *arrays, **params)


def is_cudnn_result(primitive) -> bool:
    """Whether this is the forward pass of cuDNN's kernel, whose results have no name."""
    return primitive.name.startswith(CUDNN_FORWARD)


# ---- what each kernel cannot do ----


class Problem(NamedTuple):
    """What a kernel is asked to do. `make_problem` reads it off a config."""

    platform: str
    dtype: str
    head_dim: int
    seq_len: int
    softcap: bool
    dropout: bool
    ar: bool
    context: int = 1  # pieces into which a row is cut
    common: bool = False  # whether all segments of a row see some of its keys


NO_COMMON = "has no keys in common to segments"


def _uncut(p: Problem) -> str:
    if p.context > 1:
        return f"needs whole rows, and config.mesh.context = {p.context} cuts them"
    return ""


def _blocked_cannot(p: Problem) -> str:
    return "has no ar blocks" if p.ar else _uncut(p)


def _ring_cannot(p: Problem) -> str:
    if p.common:
        return NO_COMMON
    return "has no attention dropout" if p.dropout else ""


def _xla_cannot(p: Problem) -> str:
    if p.context > 1:
        return _uncut(p)
    if p.softcap:
        return "has no soft-cap"
    return "has no attention dropout" if p.dropout else ""


def _cudnn_cannot(p: Problem) -> str:
    if p.platform != "gpu":
        return f"needs a GPU, this is {p.platform}"
    if p.dtype == "float32":
        return "needs config.compute.dtype = bfloat16"
    # On GPUs before Hopper cuDNN refuses more than 128 by itself.
    if p.head_dim % 8 or p.head_dim > 256:
        return "needs a head_dim divisible by 8 and at most 256"
    return _xla_cannot(p)


def _splash_cannot(p: Problem) -> str:
    if p.platform != "tpu":
        return f"needs a TPU, this is {p.platform}"
    if p.dropout or p.ar:
        return "has no attention dropout and no ar blocks"
    if p.common:
        return NO_COMMON
    multiple = 128 * p.context
    return f"needs seq_len divisible by {multiple}" if p.seq_len % multiple else ""


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
    tells whether `is_kernel_result` knows the kernel. `has_cycles` tells whether the TPU compiler
    writes the kernel's cycles. `check_length` is the length of the check's rows, for a device along
    the axis context.
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
    has_cycles: bool = True
    # A kernel that skips blocks gets several of them.
    check_length: int = 256


KERNELS = {
    "reference": Kernel(
        _reference, _uncut, weights=_reference_weights, makes_maps=True, skips_future=False
    ),
    "blocked": Kernel(_blocked, _blocked_cannot),
    "ring": Kernel(_reference, _ring_cannot, cut=ring.ring_attention),
    "xla": Kernel(
        partial(_jax_attention, "xla"),
        _xla_cannot,
        makes_maps=True,
        skips_future=False,
        check_length=32,
    ),
    "cudnn": Kernel(
        partial(_jax_attention, "cudnn"),
        _cudnn_cannot,
        "gpu",
        efficiency=0.55,
        keeps_result=True,
        has_cycles=False,
        check_length=32,
    ),
    "splash": Kernel(
        _splash,
        _splash_cannot,
        "tpu",
        partial(splash.attention, axis="context"),
        efficiency=0.45,
        keeps_result=True,
        has_cycles=False,
    ),
}
PREFERENCE = {
    "cpu": ("blocked", "reference", "ring"),
    "gpu": ("cudnn", "xla", "reference", "ring"),
    "tpu": ("splash", "xla", "reference", "ring"),
}


def make_problem(
    model: config.Model,
    dtype: str,
    seq_len: int,
    platform: str,
    ar: bool = False,
    context: int = 1,
    common: bool = False,
) -> Problem:
    """Describes the attention problem that a model poses on `platform` (cpu, gpu or tpu).

    Rows are cut into `context` pieces. `common` tells whether all segments see some of the keys.
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
    )


def choose_kernel(
    name: str, p: Problem, length_ramp: tuple[tuple[int, int], ...] = ()
) -> tuple[str, str]:
    """Chooses a kernel for the problem -> (kernel, reason).

    `auto` takes the first of the platform's PREFERENCE that can solve it. Raises UsageError if a
    named kernel cannot solve the problem, or none can. Raises it also if the kernel cannot take a
    length of `train.length_ramp`: a slower kernel for all rows would be dear, and nobody asked.
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
        return name, "asked for"

    passed = []
    for candidate in PREFERENCE.get(p.platform, ("reference",)):
        reason = KERNELS[candidate].cannot(p)
        if not reason:
            return candidate, "; ".join(passed) or f"fastest known on {p.platform}"
        passed.append(f"{candidate} {reason}")
    raise UsageError(f"config.compute.kernel = 'auto': nothing can do this: {'; '.join(passed)}")


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
