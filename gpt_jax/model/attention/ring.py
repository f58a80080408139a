"""Attention over rows that are cut over the mesh axis context, for use inside jax.shard_map.

In ring attention (Liu et al. 2023, arXiv:2310.01889) every device keeps its queries, and the keys
and values go round. Partial results are merged by their running maxima and sums. The backward pass
sends the keys round again, and their gradients with them. On one device this is the method of Dao
et al. 2022, arXiv:2205.14135. Nothing of size [t, t] is stored.

`schedule` decides while tracing which blocks of keys a device needs at which step. The tokens lie
in the mesh's order (`sharding.token_order`). Causal order therefore leaves every device the same
number of blocks.

Shapes: c devices along the axis, T tokens of a row. A device has t = T / c of them, in M blocks of
b tokens. B batch, N heads, K kv heads, G = N / K, H head_dim.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import sharding
from gpt_jax.model.attention.attend import scale_queries
from gpt_jax.model.layers.extras import softcap

BLOCK = 1024  # tokens of a block, about: float32 scores take 4 MiB a head at a time
NEVER = 1 << 30  # a distance that no window reaches
LOWEST = float(jnp.finfo(jnp.float32).min)


# ---- which blocks meet at which step ----


class Step(NamedTuple):
    """One step round the ring.

    Before the step the keys move on by `shift` devices. `items`, int32 [c, L, 3], lists what each
    device computes: (query block, key block, distance in tokens between their first ones).
    """

    shift: int
    items: np.ndarray


def schedule(length: int, pieces: int, size: int, window: int, both_ways: bool) -> list[Step]:
    """Lists the steps for rows of `length` tokens over `pieces` devices in blocks of `size`.

    A pair of blocks is listed if the window and causal order let some query see some key.
    `both_ways` lifts causal order. A step without any pair is left out.

    A device with fewer pairs than another repeats its first pair, out of reach of the window.
    """
    first = sharding.token_order(length, pieces).reshape(pieces, -1, size)[:, :, 0]
    steps = []
    last_turn = 0
    for turn in range(pieces):
        lists = [
            _list_pairs(first[device], first[(device - turn) % pieces], size, window, both_ways)
            for device in range(pieces)
        ]

        longest = max(len(pairs) for pairs in lists)
        if longest:
            items = np.stack([_pad_pairs(pairs, longest) for pairs in lists])
            steps.append(Step(turn - last_turn, items.astype(np.int32)))
            last_turn = turn
    return steps


def _list_pairs(queries, keys, size: int, window: int, both_ways: bool) -> np.ndarray:
    """Lists the pairs of blocks that meet, [pairs, 3], by the blocks' first tokens."""
    distance = queries[:, None] - keys[None, :]
    in_reach = distance - size < window - 1 if window else True
    in_order = both_ways | (distance + size > 0)
    query, key = np.nonzero(in_reach & in_order)
    return np.stack([query, key, distance[query, key]], 1)


def _pad_pairs(pairs: np.ndarray, count: int) -> np.ndarray:
    """Lengthens a list of pairs to `count` by pairs that see nothing."""
    idle = np.tile([[0, 0, NEVER]], (count - len(pairs), 1))
    return np.concatenate([pairs, idle])


def block_size(chunk: int) -> int:
    """Returns the divisor of `chunk` that is nearest to BLOCK in ratio."""
    divisors = [n for n in range(1, chunk + 1) if chunk % n == 0]
    return min(divisors, key=lambda n: max(n / BLOCK, BLOCK / n))


# ---- the ring ----


def ring_attention(q, k, v, pattern, cap: float = 0.0, axis: str = "context"):
    """Does what attend.attend does, for rows that are cut over the mesh axis `axis`.

    q [B, t, N, H], k and v [B, t, K, H] and the pattern's columns [B, t] are this device's parts.
    The result is [B, t, N, H]. All mesh axes are manual. The window counts tokens of the text.

    Scores, softmax and sums are in float32. A query that may look at nothing gets 0. The function
    can be differentiated once, in reverse.
    """
    B, t, N, H = q.shape
    K = k.shape[2]
    G = N // K
    pieces = jax.lax.axis_size(axis)
    # A device has two chunks of the text, and a block is a part of one chunk.
    size = block_size(t if pieces == 1 else t // 2)
    steps = schedule(t * pieces, pieces, size, pattern.window, pattern.block is not None)

    def split_column(x):
        return None if x is None else jnp.moveaxis(x.reshape(B, -1, size), 1, 0)

    # One dim is split or joined at a time: under vmap over a pipeline's stages no reshape can do
    # more.
    q = scale_queries(q).reshape(B, t, K, G, H)
    q = jnp.moveaxis(q.reshape(B, -1, size, K, G, H), (1, 2), (0, 4))
    k, v = (jnp.moveaxis(x.reshape(B, -1, size, K, H), (1, 2), (0, 3)) for x in (k, v))

    ring = _Ring(axis, steps, pattern.window, cap)
    segment = split_column(pattern.segment)
    block = split_column(pattern.block)
    out = cast(jax.Array, _ring(ring, q, k, v, segment, block))
    return jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, t, K, G, H).reshape(B, t, N, H)


class _Ring(NamedTuple):
    """What is known while tracing."""

    axis: str
    steps: list[Step]
    window: int
    cap: float

    def move(self, tree, by: int):
        """Sends `tree` to the device `by` places on."""
        size = jax.lax.axis_size(self.axis)
        return jax.lax.ppermute(tree, self.axis, [(i, (i + by) % size) for i in range(size)])

    def go_round(self, step: Callable, keys, state):
        """Runs `step(state, keys, items, shift)` for every step, and returns the last `state`.

        While one step computes, the keys of the next are on their way. Equal steps in a row are
        one loop, which stores two devices' keys and no more.
        """
        me = jax.lax.axis_index(self.axis)
        next_shifts = [step.shift for step in self.steps[1:]] + [0]

        def kind(pair):
            step, next_shift = pair
            return step.shift, next_shift, step.items.shape

        pairs = zip(self.steps, next_shifts, strict=True)
        for (shift, next_shift, _), group in groupby(pairs, kind):
            items = jnp.asarray(np.stack([step.items for step, _ in group], 1))[me]
            turn = partial(self._turn, step, shift, next_shift)
            (keys, state), _ = jax.lax.scan(turn, (keys, state), items)
        return state

    def _turn(self, step: Callable, shift: int, next_shift: int, carry, items):
        """One turn of the loop in `go_round`."""
        keys, state = carry
        next_keys = self.move(keys, next_shift) if next_shift else keys
        return (next_keys, step(state, keys, items, shift)), None

    def mask(self, distance, query_columns, key_columns, size: int):
        """Does what kernels.make_mask does, for two blocks -> bool [B or 1, 1, 1, b, b].

        `distance` lies between their first tokens.
        """
        segment, block = query_columns
        key_segment, key_block = key_columns

        distance = distance + jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
        if block is None:
            mask = (distance >= 0)[None]
        else:
            mask = key_block[:, None, :] <= block[:, :, None]
        if self.window:
            mask = mask & (distance < self.window)[None]
        if segment is not None:
            same = segment[:, :, None] == key_segment[:, None, :]
            mask = mask & same & (key_segment != 0)[:, None, :]
        return mask[:, None, None]

    def scores(self, q, k):
        return softcap(_product("bkgth,bksh->bkgts", q, k), self.cap)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _pick(tree, place):
    def pick(x):
        return jax.lax.dynamic_index_in_dim(x, place, keepdims=False)

    return jax.tree.map(pick, tree)


def _put(tree, parts, place):
    def put(x, part):
        return jax.lax.dynamic_update_index_in_dim(x, part, place, 0)

    return jax.tree.map(put, tree, parts)


def _add(sums, part, place):
    return _put(sums, _pick(sums, place) + part, place)


def _tie(keys):
    """`keys` that all depend on each other.

    JAX splits what does not depend on weights off a loop, as the columns here. Two loops with
    collectives would then run at once, and jaxlib 0.10.2 mixes their collectives on CPUs.
    """
    return jax.lax.optimization_barrier(keys)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: _Ring, q, k, v, segment, block):
    """Attends from q [M, B, K, G, b, H], already scaled -> [M, B, K, G, b, H].

    k and v are [M, B, K, b, H]. The columns are [M, B, b] or None.
    """
    return _forward(ring, q, k, v, segment, block)[0]


def _forward(ring, q, k, v, segment, block):
    """Returns the result, and what `_backward` needs."""
    own_columns = (segment, block)
    own_keys = _tie((k, v, segment, block))
    # The sums start empty: outputs, the largest score so far, and the sum of probabilities.
    state = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(q.shape[:-1], LOWEST),
        jnp.zeros(q.shape[:-1], jnp.float32),
    )

    def merge(keys, state, item):
        query_place = item[0]
        key_place = item[1]
        distance = item[2]
        query, columns = _pick((q, own_columns), query_place)
        k, v, *key_columns = _pick(keys, key_place)
        out, top, total = _pick(state, query_place)

        mask = ring.mask(distance, columns, key_columns, q.shape[4])
        scores = ring.scores(query, k)
        best = jnp.maximum(top, jnp.where(mask, scores, LOWEST).max(-1))
        probs = jnp.where(mask, jnp.exp(scores - best[..., None]), 0)
        fade = jnp.exp(top - best)
        out = out * fade[..., None] + _product("bkgts,bksh->bkgth", probs.astype(v.dtype), v)
        return _put(state, (out, best, total * fade + probs.sum(-1)), query_place), None

    def step(state, keys, items, shift):
        return jax.lax.scan(partial(merge, keys), state, items)[0]

    out, top, total = ring.go_round(step, own_keys, state)
    is_seen = total > 0
    out = jnp.where(is_seen[..., None], out / jnp.where(is_seen, total, 1)[..., None], 0)
    out = out.astype(q.dtype)
    log_sum = jnp.where(is_seen, top + jnp.log(jnp.where(is_seen, total, 1)), 0)
    return out, (q, k, v, segment, block, out, log_sum)


def _backward(ring, saved, d_out):
    """Returns the gradients of q, k and v. The keys and their gradients go round together."""
    q, k, v, segment, block, out, log_sum = saved
    own_columns = (segment, block)
    own_keys = _tie((k, v, segment, block))
    pull = (d_out.astype(jnp.float32) * out).sum(-1)

    def merge(keys, state, item):
        query_place = item[0]
        key_place = item[1]
        distance = item[2]
        query_side = _pick((q, d_out, log_sum, pull, own_columns), query_place)
        query, d_out_here, log_sum_here, pull_here, columns = query_side
        k, v, *key_columns = _pick(keys, key_place)

        mask = ring.mask(distance, columns, key_columns, q.shape[4])
        scores = ring.scores(query, k)
        probs = jnp.where(mask, jnp.exp(scores - log_sum_here[..., None]), 0)
        d_scores = probs * (_product("bkgth,bksh->bkgts", d_out_here, v) - pull_here[..., None])
        if ring.cap:
            d_scores = d_scores * (1 - (scores / ring.cap) ** 2)
        probs = probs.astype(v.dtype)
        d_scores = d_scores.astype(q.dtype)

        d_q, d_k, d_v = state
        d_q = _add(d_q, _product("bkgts,bksh->bkgth", d_scores, k), query_place)
        d_k = _add(d_k, _product("bkgts,bkgth->bksh", d_scores, query), key_place)
        d_v = _add(d_v, _product("bkgts,bkgth->bksh", probs, d_out_here), key_place)
        return (d_q, d_k, d_v), None

    def step(state, keys, items, shift):
        d_q, d_keys = state
        if shift:
            # The gradients travel while those of this step are computed.
            d_keys = ring.move(d_keys, shift)
        fresh = jax.tree.map(jnp.zeros_like, d_keys)
        (d_q, *added), _ = jax.lax.scan(partial(merge, keys), (d_q, *fresh), items)
        return d_q, jax.tree.map(jnp.add, d_keys, tuple(added))

    d_keys = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    d_q, d_keys = ring.go_round(step, own_keys, (jnp.zeros(q.shape, jnp.float32), d_keys))
    if away := sum(step.shift for step in ring.steps):
        d_keys = ring.move(d_keys, -away)
    d_k, d_v = d_keys
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)


# ---- kernels that want whole keys ----


def gather(x, axis: str = "context"):
    """Gathers all devices' parts of a row, x [B, t, …], as [B, T, …] in the order of the text.

    The parts are in the mesh's order (`sharding.token_order`).
    """
    if jax.lax.axis_size(axis) == 1:
        return x
    parts = jax.lax.all_gather(x, axis)
    halves = parts.reshape(parts.shape[0], x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
    # Device i has the i-th chunk of the text and the i-th last.
    chunks = jnp.concatenate([halves[:, :, 0], halves[::-1, :, 1]])
    return jnp.moveaxis(chunks, 0, 1).reshape(x.shape[0], -1, *x.shape[2:])
