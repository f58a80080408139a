"""Attention over rows that are cut over the mesh axis context (called by kernels, inside
jax.shard_map).

Ring attention (Liu et al. 2023, arXiv:2310.01889): every device keeps its queries, and the keys and
values go round. Partial results are merged by their running maxima and sums; the backward pass
sends the keys round again, and their gradients with them (Dao et al. 2022, arXiv:2205.14135, on one
device). Nothing of size [t, t] is kept. Which blocks of keys a device needs at which step is a
table made while tracing (`schedule`): in the mesh's order of tokens (placing.order) causal order
leaves every device the same number.

Shapes: c devices along the axis, T tokens of a row, t = T / c of them on one device in M blocks of
b, B batch, N heads, K kv heads, G = N / K, H head_dim.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import sharding
from gpt_jax.model.layers.extras import softcap

BLOCK = 1024  # tokens of a block, about: float32 scores of 4 MiB a head at a time
NEVER = 1 << 30  # a distance that no window reaches
LOWEST = float(jnp.finfo(jnp.float32).min)


class Step(NamedTuple):
    """One step round the ring. `shift`: devices by which the keys move on before it; `items`
    int32 [c, L, 3]: by device, the pairs (query block, key block, distance in tokens between
    their first ones) to be computed."""

    shift: int
    items: np.ndarray


def schedule(length: int, pieces: int, size: int, window: int, both_ways: bool) -> list[Step]:
    """The steps for rows of `length` tokens over `pieces` devices in blocks of `size`: the pairs
    of blocks in which causal order (unless `both_ways`) and the window let some query see some
    key. A step without any is left out; a device with fewer than another repeats its first pair
    out of reach of the window."""
    first = sharding.token_order(length, pieces).reshape(pieces, -1, size)[:, :, 0]
    steps, at = [], 0
    for turn in range(pieces):
        lists = []
        for device in range(pieces):
            apart = first[device][:, None] - first[(device - turn) % pieces][None, :]
            seen = (apart - size < window - 1 if window else True) & (
                both_ways | (apart + size > 0)
            )
            query, key = np.nonzero(seen)
            lists.append(np.stack([query, key, apart[query, key]], 1))
        most = max(map(len, lists))
        if most:

            def idle(pairs):
                return np.tile([[0, 0, NEVER]], (most - len(pairs), 1))

            items = np.stack([np.concatenate([pairs, idle(pairs)]) for pairs in lists])
            steps.append(Step(turn - at, items.astype(np.int32)))
            at = turn
    return steps


def block_size(chunk: int) -> int:
    """The divisor of `chunk` nearest to BLOCK in ratio."""
    divisors = [n for n in range(1, chunk + 1) if chunk % n == 0]
    return min(divisors, key=lambda n: max(n / BLOCK, BLOCK / n))


def ring_attention(q, k, v, pattern, cap: float = 0.0, axis: str = "context"):
    """kernels.attend with the mask of `pattern` for rows cut over the mesh axis `axis` in
    placing.order.

    q [B, t, N, H], k and v [B, t, K, H], the columns of `pattern` [B, t]: this device's parts,
    all mesh axes manual; the window counts tokens of the text -> [B, t, N, H]. Scores, softmax
    and sums in float32. A query that may look at nothing gets 0. Differentiable once, in
    reverse."""
    B, t, N, H = q.shape
    K, pieces = k.shape[2], jax.lax.axis_size(axis)
    size = block_size(t if pieces == 1 else t // 2)
    steps = schedule(t * pieces, pieces, size, pattern.window, pattern.block is not None)

    def column(x):
        return None if x is None else jnp.moveaxis(x.reshape(B, -1, size), 1, 0)

    # One dim is split or joined at a time: under vmap over a pipeline's stages no reshape can do
    # more.
    q = (q * jnp.asarray(H**-0.5, q.dtype)).reshape(B, t, K, N // K, H)
    q = jnp.moveaxis(q.reshape(B, -1, size, K, N // K, H), (1, 2), (0, 4))
    k, v = (jnp.moveaxis(x.reshape(B, -1, size, K, H), (1, 2), (0, 3)) for x in (k, v))
    out = _ring(
        _Ring(axis, steps, pattern.window, cap),
        q,
        k,
        v,
        column(pattern.segment),
        column(pattern.block),
    )
    return jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, t, K, N // K, H).reshape(B, t, N, H)


class _Ring(NamedTuple):
    """What is known while tracing."""

    axis: str
    steps: list[Step]
    window: int
    cap: float

    def move(self, tree, by: int):
        """`tree` to the device `by` places on."""
        size = jax.lax.axis_size(self.axis)
        return jax.lax.ppermute(tree, self.axis, [(i, (i + by) % size) for i in range(size)])

    def go_round(self, step: Callable, held, state):
        """`state` after every `step(state, held, items, shift)`; `held`: the keys. While one
        step computes, the keys of the next are on their way. Equal steps in a row are one loop,
        which holds two devices' keys and no more."""
        me = jax.lax.axis_index(self.axis)
        onward = [step.shift for step in self.steps[1:]] + [0]

        def kind(pair):
            return (pair[0].shift, pair[1], pair[0].items.shape)

        for (shift, next_shift, _), group in groupby(zip(self.steps, onward), kind):
            items = jnp.asarray(np.stack([step.items for step, _ in group], 1))[me]

            def turn(carry, items):
                held, state = carry
                coming = self.move(held, next_shift) if next_shift else held
                return (coming, step(state, held, items, shift)), None

            (held, state), _ = jax.lax.scan(turn, (held, state), items)
        return state

    def mask(self, apart, query_columns, key_columns, size: int):
        """kernels.make_mask for two blocks whose first tokens are `apart` -> bool [B or 1, 1, 1,
        b, b]."""
        (segment, block), (key_segment, key_block) = query_columns, key_columns
        apart = apart + jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
        mask = (apart >= 0)[None] if block is None else key_block[:, None, :] <= block[:, :, None]
        if self.window:
            mask = mask & (apart < self.window)[None]
        if segment is not None:
            mask = (
                mask
                & (segment[:, :, None] == key_segment[:, None, :])
                & (key_segment != 0)[:, None, :]
            )
        return mask[:, None, None]

    def scores(self, q, k):
        return softcap(_product("bkgth,bksh->bkgts", q, k), self.cap)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _pick(tree, place):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), tree)


def _put(tree, parts, place):
    return jax.tree.map(
        lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, place, 0), tree, parts
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: _Ring, q, k, v, segment, block):
    """q [M, B, K, G, b, H], scaled, k and v [M, B, K, b, H], columns [M, B, b] or None -> [M, B,
    K, G, b, H]."""
    return _forward(ring, q, k, v, segment, block)[0]


def _forward(ring, q, k, v, segment, block):
    own, held = (segment, block), (k, v, segment, block)
    state = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(q.shape[:-1], LOWEST),
        jnp.zeros(q.shape[:-1], jnp.float32),
    )

    def merge(held, state, item):
        (query, columns), (k, v, *key_columns) = _pick((q, own), item[0]), _pick(held, item[1])
        out, top, total = _pick(state, item[0])
        mask = ring.mask(item[2], columns, key_columns, q.shape[4])
        scores = ring.scores(query, k)
        best = jnp.maximum(top, jnp.where(mask, scores, LOWEST).max(-1))
        probs, fade = jnp.where(mask, jnp.exp(scores - best[..., None]), 0), jnp.exp(top - best)
        out = out * fade[..., None] + _product("bkgts,bksh->bkgth", probs.astype(v.dtype), v)
        return _put(state, (out, best, total * fade + probs.sum(-1)), item[0]), None

    def step(state, held, items, shift):
        return jax.lax.scan(partial(merge, held), state, items)[0]

    out, top, total = ring.go_round(step, held, state)
    seen = total > 0
    out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1)[..., None], 0).astype(q.dtype)
    return out, (
        q,
        k,
        v,
        segment,
        block,
        out,
        jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), 0),
    )


def _backward(ring, kept, d_out):
    q, k, v, segment, block, out, log_sum = kept
    own, held = (segment, block), (k, v, segment, block)
    pull = (d_out.astype(jnp.float32) * out).sum(-1)

    def merge(held, state, item):
        ours, (k, v, *key_columns) = (
            _pick((q, d_out, log_sum, pull, own), item[0]),
            _pick(held, item[1]),
        )
        query, d_out_here, log_sum_here, pull_here, columns = ours
        mask = ring.mask(item[2], columns, key_columns, q.shape[4])
        scores = ring.scores(query, k)
        probs = jnp.where(mask, jnp.exp(scores - log_sum_here[..., None]), 0)
        d_scores = probs * (_product("bkgth,bksh->bkgts", d_out_here, v) - pull_here[..., None])
        if ring.cap:
            d_scores = d_scores * (1 - (scores / ring.cap) ** 2)
        probs, d_scores = probs.astype(v.dtype), d_scores.astype(q.dtype)
        d_q, d_k, d_v = state
        d_q = _put(d_q, _pick(d_q, item[0]) + _product("bkgts,bksh->bkgth", d_scores, k), item[0])
        d_k = _put(
            d_k, _pick(d_k, item[1]) + _product("bkgts,bkgth->bksh", d_scores, query), item[1]
        )
        d_v = _put(
            d_v, _pick(d_v, item[1]) + _product("bkgts,bkgth->bksh", probs, d_out_here), item[1]
        )
        return (d_q, d_k, d_v), None

    def step(state, held, items, shift):
        d_q, d_held = state
        if shift:
            d_held = ring.move(d_held, shift)  # travels while this step's are computed
        fresh = jax.tree.map(jnp.zeros_like, d_held)
        (d_q, *added), _ = jax.lax.scan(partial(merge, held), (d_q, *fresh), items)
        return d_q, jax.tree.map(jnp.add, d_held, tuple(added))

    d_held = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_q, d_held = ring.go_round(step, held, (jnp.zeros(q.shape, jnp.float32), d_held))
    if away := sum(step.shift for step in ring.steps):
        d_held = ring.move(d_held, -away)
    d_k, d_v = d_held
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)


# ---- kernels that want whole keys ----


def gather(x, axis: str = "context"):
    """All devices' parts of a row, x [B, t, …] in placing.order, as [B, T, …] in the order of
    the text."""
    if jax.lax.axis_size(axis) == 1:
        return x
    parts = jax.lax.all_gather(x, axis)
    halves = parts.reshape(parts.shape[0], x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
    chunks = jnp.concatenate(
        [halves[:, :, 0], halves[::-1, :, 1]]
    )  # the i-th chunks, then the i-th last
    return jnp.moveaxis(chunks, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])
