"""Attention kernels as one table, the choice among them, and the check of the chosen one (called by
model/attention and by experiment).

Shapes: B batch, T query, S key, N heads, K kv heads, G = N / K, H head_dim. Every kernel honours
causal order, windows, segments and `ar` blocks, or says before anything compiles which of them it
cannot do.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.model.attention import ring, splash
from gpt_jax.model.attention.mask import Pattern, make_mask
from gpt_jax.model.layers.extras import softcap


def attend(q, k, v, mask, cap: float = 0.0, keep=None):
    """Softmax attention with an explicit mask, scores and softmax in float32.

    q [B, T, N, H], k and v [B, S, K, H], mask [B or 1, T, S] -> [B, T, N, H]. `keep` [B, N, T,
    S] multiplies the probabilities (dropout). A query that may look at nothing gets the mean of
    v, which a weight of 0 removes."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K

    # Heads first, and a group's queries stacked on those of its kv head: one plain batched matmul
    # over [B, K], which XLA's CPU backend runs a quarter faster than the contraction with heads
    # inside.
    def stack(x):
        return jnp.moveaxis(x.reshape(B, T, K, G, H), 1, 3).reshape(B, K, G * T, H)

    q, k, v = stack(q * jnp.asarray(H**-0.5, q.dtype)), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = softcap(jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32), cap)
    scores = scores.reshape(B, K, G, T, S)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1)
    if keep is not None:
        probs = probs * keep.reshape(B, K, G, T, S)
    out = jnp.einsum("bkts,bksh->bkth", probs.astype(v.dtype).reshape(B, K, G * T, S), v)
    return jnp.moveaxis(out.reshape(B, K, G, T, H), 3, 1).reshape(B, T, N, H)


def _reference(q, k, v, pattern, cap, keep):
    return attend(q, k, v, make_mask(pattern, q.shape[1]), cap, keep)


def _blocked(q, k, v, pattern, cap, keep):
    """The reference, for at most eight runs of queries one after another, each over the keys
    that causal order and the window leave it: half the work of the whole map, on any platform."""
    length = q.shape[1]
    mask, size, parts = make_mask(pattern, length), max(64, -(-length // 8)), []
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        keys = slice(max(0, start - pattern.window + 1) if pattern.window else 0, rows.stop)
        kept = None if keep is None else keep[:, :, rows, keys]
        parts.append(attend(q[:, rows], k[:, keys], v[:, keys], mask[:, rows, keys], cap, kept))
    return jnp.concatenate(parts, axis=1)


def _jax_attention(implementation, q, k, v, pattern, cap, keep):
    """jax.nn.dot_product_attention. Segments and blocks go in as a mask: without one its kernels
    would ignore them."""
    plain = pattern.segment is None and pattern.block is None
    window = {"local_window_size": (pattern.window - 1, 0)} if plain and pattern.window else {}
    mask = None if plain else make_mask(pattern, q.shape[1])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=plain, implementation=implementation, **window
    )


def _splash(q, k, v, pattern, cap, keep, interpret=False):
    return splash.attention(q, k, v, pattern, cap, interpret=interpret)


class Problem(NamedTuple):
    """What a kernel is asked to do: read off a config by `problem`."""

    platform: str
    dtype: str
    head_dim: int
    seq_len: int
    softcap: bool
    dropout: bool
    ar: bool
    context: int = 1  # pieces into which a row is cut


def _uncut(p: Problem) -> str:
    return (
        f"needs whole rows, and config.mesh.context = {p.context} cuts them"
        if p.context > 1
        else ""
    )


def _blocked_cannot(p: Problem) -> str:
    return "has no ar blocks" if p.ar else _uncut(p)


def _ring_cannot(p: Problem) -> str:
    return "has no attention dropout" if p.dropout else ""


def _xla_cannot(p: Problem) -> str:
    if p.context > 1:
        return _uncut(p)
    return "has no soft-cap" if p.softcap else "has no attention dropout" if p.dropout else ""


def _cudnn_cannot(p: Problem) -> str:
    if p.platform != "gpu":
        return f"needs a GPU, this is {p.platform}"
    if p.dtype == "float32":
        return "needs config.compute.dtype = bfloat16"
    if (
        p.head_dim % 8 or p.head_dim > 256
    ):  # on GPUs before Hopper it also refuses more than 128, by itself
        return "needs a head_dim divisible by 8 and at most 256"
    return _xla_cannot(p)


def _splash_cannot(p: Problem) -> str:
    if p.platform != "tpu":
        return f"needs a TPU, this is {p.platform}"
    if p.dropout or p.ar:
        return "has no attention dropout and no ar blocks"
    return f"needs seq_len divisible by {128 * p.context}" if p.seq_len % (128 * p.context) else ""


class Kernel(NamedTuple):
    run: Callable  # (q, k, v, pattern, cap, keep) -> [B, T, N, H]
    cannot: Callable  # Problem -> "" or the reason it cannot
    platform: str = "cpu"  # one that it is for
    cut: Callable | None = None  # (q, k, v, pattern, cap) for rows cut over the mesh axis context


KERNELS = {
    "reference": Kernel(_reference, _uncut),
    "blocked": Kernel(_blocked, _blocked_cannot),
    "ring": Kernel(_reference, _ring_cannot, cut=ring.ring_attention),
    "xla": Kernel(partial(_jax_attention, "xla"), _xla_cannot),
    "cudnn": Kernel(partial(_jax_attention, "cudnn"), _cudnn_cannot, "gpu"),
    "splash": Kernel(_splash, _splash_cannot, "tpu", partial(splash.attention, axis="context")),
}
PREFERENCE = {
    "cpu": ("blocked", "reference", "ring"),
    "gpu": ("cudnn", "xla", "reference", "ring"),
    "tpu": ("splash", "xla", "reference", "ring"),
}


def make_problem(
    model: config.Model, dtype: str, seq_len: int, platform: str, ar: bool = False, context: int = 1
) -> Problem:
    """The attention problem that a model poses on `platform` (cpu, gpu or tpu), rows cut into
    `context` pieces."""
    return Problem(
        platform,
        dtype,
        model.head_dim,
        seq_len,
        model.attention_softcap > 0,
        model.attention_dropout > 0,
        ar,
        context,
    )


def choose_kernel(name: str, p: Problem) -> tuple[str, str]:
    """(kernel, reason). A named kernel is taken or UsageError says why it cannot; `auto` takes
    the first that can."""
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
    """Kernel `name` on each device's own batch rows and heads; shapes as in `attend`."""

    cut = sharding.count_parts("seq") > 1
    asked = Problem(
        KERNELS[name].platform,
        q.dtype.name,
        q.shape[-1],
        q.shape[1],
        cap > 0,
        keep is not None,
        pattern.block is not None,
        sharding.count_parts("seq"),
    )
    if reason := KERNELS[name].cannot(asked):
        raise UsageError(f"config.compute.kernel = {name!r}: {reason}; choose another kernel")

    def run(q, k, v, segment, block, keep):
        own = Pattern(pattern.window, segment, block)
        return (
            KERNELS[name].cut(q, k, v, own, cap)
            if cut
            else KERNELS[name].run(q, k, v, own, cap, keep)
        )

    def heads(n):
        return ("batch", "seq", n, "head_dim")

    def column(x):
        return None if x is None else ("batch", "seq")

    axes = (
        heads("heads"),
        heads("kv_heads"),
        heads("kv_heads"),
        column(pattern.segment),
        column(pattern.block),
        None if keep is None else ("batch", "heads", "seq", "keys"),
    )
    return sharding.run_local(run, axes, heads("heads"))(
        q, k, v, pattern.segment, pattern.block, keep
    )


def measure_conformance(
    name: str, model: config.Model, dtype: str, segments: bool, rows: int
) -> float:
    """Largest difference between kernel `name` and `reference` on a tiny packed batch, on the
    devices of the current mesh.

    `rows`: batch rows, a multiple of those that a mesh cuts them into (placing.row_parts). With
    `segments`, changing the first document must not change the second in the slightest. Raises
    UsageError when the kernel is wrong; returns the error relative to the largest value."""
    length = (
        32 if name in ("xla", "cudnn") else 256 * sharding.count_parts("seq")
    )  # several of the blocks that it skips
    windows = sorted({min(w, length // 4) for w in model.windows})  # short enough to be seen
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((rows, length, heads, model.head_dim)), dtype)
        for heads in (model.heads, model.kv_heads, model.kv_heads)
    )
    segment = (
        jnp.asarray(np.repeat([[1] * (length // 2) + [2] * (length // 2)], rows, 0))
        if segments
        else None
    )

    def place(x, axis):
        return sharding.constrain(sharding.reorder(x), "batch", "seq", axis, "head_dim")

    @partial(jax.jit, static_argnums=(0, 1))
    def run(kernel, window, q, k, v):
        with sharding.using_rules(sharding.WHOLE_ROWS if kernel == "reference" else {}):
            column = (
                None
                if segment is None
                else sharding.constrain(sharding.reorder(segment), "batch", "seq")
            )
            q, k, v = place(q, "heads"), place(k, "kv_heads"), place(v, "kv_heads")
            found = attention(kernel, q, k, v, Pattern(window, column), model.attention_softcap)
            return sharding.reorder(
                sharding.constrain(found, "batch", None, "heads", "head_dim"), back=True
            )

    def difference(ours, reference):
        return float(
            jnp.max(jnp.abs(ours - reference).astype(jnp.float32)) / jnp.max(jnp.abs(reference))
        )

    error = float(
        np.max(
            [
                difference(run(name, window, q, k, v), run("reference", window, q, k, v))
                for window in windows
            ]
        )
    )  # numpy's, which lets no nan pass
    limit = 1e-4 if dtype == "float32" else 3e-2
    if not error <= limit:
        raise UsageError(
            f"config.compute.kernel = {name!r}: differs from reference by {error:.1e} on this machine (limit "
            f"{limit:.0e}); choose another kernel"
        )
    if segments:
        first = jnp.arange(length)[None, :, None, None] < length // 2
        clean, dirty = (
            run(name, windows[0], q, k, x)[:, length // 2 :]
            for x in (v, jnp.where(first, v + 100, v))
        )
        leaked = clean != dirty
        if bool(leaked.any()):
            raise UsageError(
                f"config.compute.kernel = {name!r}: lets a document see the one before it in a packed row; "
                "choose another kernel"
            )
    return error
