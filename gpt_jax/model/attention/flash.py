"""Flash attention for GPUs, forward and backward, by Pallas and Triton.

It reads no block of keys that causal order, the window or the bounds of documents rule out, and it
has soft-caps. Memory grows with the length of a row, not with its square. No GPU has run it so far:
its results are tested interpreted, and its programs are compiled for cards that are not here.

Shapes: B batch, T tokens of a row, N heads, K kv heads, G = N / K, H head_dim.
"""

import importlib.util
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from gpt_jax.model.attention.attend import scale_queries
from gpt_jax.model.attention.flash_kernels import (
    Blocks,
    Setting,
    backward_keys,
    backward_queries,
    forward,
)

RESULT = "flash_result"  # the name of output and softmax sums for `jax.checkpoint`
LENGTH = 128  # rows are filled up to a multiple of this
HEAD_DIMS = (16, 32, 64, 128, 256)  # Triton's blocks have powers of two, and its matmuls 16
LAST = jnp.iinfo(jnp.int32).max
STAGES = 2  # blocks in flight; three would not fit into the shared memory of most cards


class Programs(NamedTuple):
    """The blocks of each program."""

    forward: Blocks
    backward_queries: Blocks
    backward_keys: Blocks


# By the bytes of a head, the most that a row is for. Hopper's matmuls want 64 rows: of queries in
# two of the programs, of keys in the third. Within that these spill at most 284 bytes of registers
# on an H100 or B200 (`benchmarks/flash_programs.py`). None of them has been timed.
BLOCKS = {
    128: Programs(Blocks(128, 64, 8), Blocks(128, 64, 8), Blocks(64, 128, 8)),
    256: Programs(Blocks(128, 64, 8), Blocks(64, 64, 4), Blocks(64, 64, 4)),
    512: Programs(Blocks(64, 64, 8), Blocks(64, 32, 4), Blocks(32, 64, 8)),
    1024: Programs(Blocks(64, 32, 8), Blocks(32, 32, 8), Blocks(32, 32, 8)),
}


def attention(q, k, v, pattern, cap: float = 0.0, interpret: bool = False):
    """Lets q [B, T, N, H] attend over k and v [B, T, K, H] -> [B, T, N, H].

    H must be one of HEAD_DIMS. `ar` blocks are not supported. In padding the result is arbitrary,
    and finite.
    """
    T = q.shape[1]
    segment = pattern.segment

    # No token of the row sees what stands after it.
    spare = -T % LENGTH
    if spare:
        q, k, v = (jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0))) for x in (q, k, v))
    if spare and segment is not None:
        segment = jnp.pad(segment, ((0, 0), (0, spare)))

    out = _attend(Setting(pattern.window, cap, interpret), scale_queries(q), k, v, segment)
    return out[:, :T]


def has_triton() -> bool:
    """Whether JAX has the backend of these programs. JAX 0.12 says that a later one will not."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def list_bounds(segment, length: int, window: int, blocks: Blocks):
    """Bounds of the blocks that see each other.

    The first result [B or 1, blocks of queries] is the first block of keys that a block of queries
    sees. The second [B or 1, blocks of keys] is the block after the last block of queries that sees
    a block of keys. `segment` is [B, length], or None.

    Documents are compared by the least and the largest of a block. So the bounds hold for
    documents in any order, and are tight if they come in order.
    """
    Q, S = blocks.queries, blocks.keys
    query = jnp.arange(length // Q)[:, None] * Q
    key = jnp.arange(length // S)[None] * S

    seen = (key < query + Q)[None]
    if window:
        seen &= (query - (key + S - 1) < window)[None]
    if segment is not None:
        # Padding is 0 and comes last. Like this it is in order.
        segment = jnp.where(segment == 0, LAST, segment)
        of_queries = segment.reshape(-1, length // Q, Q)
        of_keys = segment.reshape(-1, length // S, S)
        seen &= of_keys.min(2)[:, None] <= of_queries.max(2)[:, :, None]
        seen &= of_keys.max(2)[:, None] >= of_queries.min(2)[:, :, None]

    first = jnp.argmax(seen, axis=2)
    end = length // Q - jnp.argmax(seen[:, ::-1], axis=1)
    return first.astype(jnp.int32), end.astype(jnp.int32)


# ---- the three programs, and the gradient ----


def _attend_once(setting: Setting, q, k, v, segment) -> jax.Array:
    return _run_forward(setting, q, k, v, segment)[0]


def _attend_forward(setting: Setting, q, k, v, segment):
    out, sums = _run_forward(setting, q, k, v, segment)
    out = checkpoint_name(out, RESULT)
    sums = checkpoint_name(sums, RESULT)
    return out, (q, k, v, segment, out, sums)


def _attend_backward(setting: Setting, kept, pull):
    q, k, v, segment, out, sums = kept
    delta = (out.astype(jnp.float32) * pull.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    more = (q, k, v, segment, pull, sums, delta)
    return _run_backward_queries(setting, *more), *_run_backward_keys(setting, *more), None


_attend = jax.custom_vjp(_attend_once, nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _attend_backward)


def _choose_programs(q) -> Programs:
    bytes_of_head = q.shape[-1] * q.dtype.itemsize
    return BLOCKS[min(size for size in BLOCKS if size >= bytes_of_head)]


# JAX never drops a call of Pallas itself whose results nobody reads, but drops a jit around it.
# Remat leaves such calls where it keeps the results.
@partial(jax.jit, static_argnums=0)
def _run_forward(setting: Setting, q, k, v, segment):
    """Output [B, T, N, H] and softmax sums [B, N, T] in float32."""
    B, T, N, _ = q.shape
    blocks = _choose_programs(q).forward
    first, _ = list_bounds(segment, T, setting.window, blocks)
    specs = _specs_by_queries(q, k, segment, blocks.queries)
    return _launch(
        forward,
        setting,
        blocks,
        grid=(T // blocks.queries, B, N),
        in_specs=specs[:5],
        out_specs=[specs[1], specs[6]],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
    )(first, q, k, v, segment)


def _run_backward_queries(setting: Setting, q, k, v, segment, pull, sums, delta):
    B, T, N, _ = q.shape
    blocks = _choose_programs(q).backward_queries
    first, _ = list_bounds(segment, T, setting.window, blocks)
    specs = _specs_by_queries(q, k, segment, blocks.queries)
    return _launch(
        backward_queries,
        setting,
        blocks,
        grid=(T // blocks.queries, B, N),
        in_specs=specs,
        out_specs=specs[1],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(first, q, k, v, segment, pull, sums, delta)


def _run_backward_keys(setting: Setting, q, k, v, segment, pull, sums, delta):
    B, T, K, H = k.shape
    G = q.shape[2] // K
    blocks = _choose_programs(q).backward_keys
    _, end = list_bounds(segment, T, setting.window, blocks)

    own = pl.BlockSpec((None, blocks.keys, None, H), lambda j, b, h: (b, j, h, 0))
    group = pl.BlockSpec((None, T, G, H), lambda j, b, h: (b, 0, h, 0))
    sums_of_group = pl.BlockSpec((None, G, T), lambda j, b, h: (b, h, 0))
    return _launch(
        backward_keys,
        setting,
        blocks,
        grid=(T // blocks.keys, B, K),
        in_specs=[
            _spec_of_bounds(segment),
            group,
            own,
            own,
            _spec_of_segment(segment),
            group,
            sums_of_group,
            sums_of_group,
        ],
        out_specs=[own, own],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    )(end, q, k, v, segment, pull, sums, delta)


def _launch(kernel, setting: Setting, blocks: Blocks, **how):
    from jax.experimental.pallas import triton

    return pl.pallas_call(
        partial(kernel, setting=setting, blocks=blocks),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=STAGES),
        interpret=setting.interpret,
        name=f"flash_{kernel.__name__}",
        **how,
    )


def _specs_by_queries(q, k, segment, size: int) -> list:
    """What a program for one block of queries gets.

    These are bounds, q, k, v, segment, pull, sums and delta. Keys of the whole row are within its
    reach.
    """
    _, T, N, H = q.shape
    G = N // k.shape[2]
    own = pl.BlockSpec((None, size, None, H), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, T, None, H), lambda i, b, n: (b, 0, n // G, 0))
    sums = pl.BlockSpec((None, None, size), lambda i, b, n: (b, n, i))
    return [
        _spec_of_bounds(segment),
        own,
        keys,
        keys,
        _spec_of_segment(segment),
        own,
        sums,
        sums,
    ]


def _spec_of_bounds(segment):
    """One bound of each block: of each row, or of all rows if there are no documents."""
    if segment is None:
        return pl.BlockSpec((None, None), lambda i, b, n: (0, i))
    return pl.BlockSpec((None, None), lambda i, b, n: (b, i))


def _spec_of_segment(segment):
    if segment is None:
        return None
    return pl.BlockSpec((None, segment.shape[1]), lambda i, b, n: (b, 0))
