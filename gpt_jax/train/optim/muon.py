"""Muon: momentum that is orthogonalised matrix by matrix.

Leaves are float32 kernels `[in, out]` or stacks of them: `[L, in, out]` of layers, and `[L, E, in,
out]` of their experts. The code is our own, because the optax version lacks row normalisation,
cautious decay and momentum warmup. Nor does it let the caller choose where a matrix is
orthogonalised. Muon is by Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.train.optim.schedule import progress
from gpt_jax.train.optim.whole_matrices import on_whole_matrices

# Polar Express (Amsel et al. 2025, arXiv 2505.16932, algorithm 1). A row has the a, b, c of
# a x + b x^3 + c x^5 for one iteration. The rows are the best polynomials in turn for singular
# values from 1e-3 to 1. All but the last are slowed by the paper's safety factor of 1.01. So
# rounding in bfloat16 cannot push a singular value out of the interval. Five iterations leave the
# singular values within 0.85 to 1.13, six within 0.6 %. The last row converges cubically and
# serves all later iterations.
_RAW = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLAR_EXPRESS = (
    *tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _RAW),
    (1.875, -1.25, 0.375),
)
WARMUP_MOMENTUM = 0.85  # the momentum at the start of its warmup (modded-nanogpt, nanochat)
TINY = 1e-10  # floor of the row normalisation's second moment and norm (nanochat)


class MuonState(NamedTuple):
    count: jax.Array  # updates done, int32 scalar
    momentum: Any  # shaped and sharded like the parameters


class RowState(NamedTuple):
    square: Any  # [..., 1, out] or [..., in, 1], sharded like the parameters


class DecayState(NamedTuple):
    count: jax.Array  # updates done, int32 scalar


def orthogonalize(x, iterations: int = 5, eps: float = 1e-8, dtype=jnp.float32) -> jax.Array:
    """The nearest (semi-)orthogonal matrix of every `[..., m, n]` in `x`, float32.

    The singular values are pushed to 1. Products run in `dtype` on the smaller side. A zero matrix
    stays zero.
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else jnp.swapaxes(x, -1, -2)

    x = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = (x / (norm + max(eps, jnp.finfo(jnp.float32).tiny))).astype(dtype)
    for i in range(iterations):
        a, b, c = POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)]
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.astype(jnp.float32)
    return x if wide else jnp.swapaxes(x, -1, -2)


def momentum_at(optim: config.Optim, b1: float) -> Callable:
    """`momentum(step)`: Muon's momentum at a step, as in nanochat. The first update is step 0.

    It rises from 0.85 to `b1` over `muon_momentum_warmup` steps. If that is 0, it is `b1` from the
    start. It falls to `muon_momentum_final` while wsd decays. If that is 0, it does not fall.
    """

    def momentum(step):
        warmup = optim.muon_momentum_warmup
        final = optim.muon_momentum_final
        risen = jnp.minimum(step / warmup, 1.0) if warmup else 1.0
        fallen = progress(step, config.wsd_start(optim), optim.decay_steps) if final else 0.0
        return (WARMUP_MOMENTUM + (b1 - WARMUP_MOMENTUM) * risen) * (1 - fallen) + final * fallen

    return momentum


def scale_by_muon(
    momentum: Callable, *, iterations: int, eps: float, dtype
) -> optax.GradientTransformation:
    """Turns gradients into orthogonalised Nesterov momentum, in nanochat's moving-average form.

    The momentum at a step is `momentum(step)`. Matrices travel and are multiplied in `dtype`.
    """

    def orthogonal(tree):
        leaves, structure = jax.tree.flatten(tree)
        updates = on_whole_matrices(
            lambda x: orthogonalize(x, iterations, eps, dtype).astype(dtype),
            [m.astype(dtype) for m in leaves],
        )
        updates = [u.astype(m.dtype) for u, m in zip(updates, leaves, strict=True)]
        return jax.tree.unflatten(structure, updates)

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        b = momentum(state.count)

        def average(m, g):
            return b * m + (1 - b) * g

        averages = jax.tree.map(average, state.momentum, updates)
        updates = orthogonal(jax.tree.map(average, averages, updates))
        return updates, MuonState(state.count + 1, averages)

    return optax.GradientTransformation(init, update)


def normalize_rows(b2: float) -> optax.GradientTransformation:
    """NorMuon (arXiv 2510.05491): normalises the update of every neuron.

    The update is divided by the root of its running mean square. The whole matrix is then scaled
    back to the Frobenius norm that it had. The neurons are those of the longer side, as in nanochat
    and modded-nanogpt, because those of the shorter side are orthonormal already.
    """

    def mean_square(u):
        return jnp.mean(jnp.square(u), axis=-2 if u.shape[-1] >= u.shape[-2] else -1, keepdims=True)

    def frobenius(u):
        return jnp.sqrt(jnp.sum(jnp.square(u), axis=(-2, -1), keepdims=True))

    def init(params):
        # The zeros come from mean_square, so that the state inherits the sharding of the axis that
        # stays.
        return RowState(jax.tree.map(lambda p: jnp.zeros_like(mean_square(p)), params))

    def update(updates, state, params=None):
        square = jax.tree.map(
            lambda s, u: b2 * s + (1 - b2) * mean_square(u), state.square, updates
        )

        def normalize(u, s):
            scaled = u * jax.lax.rsqrt(jnp.maximum(s, TINY))
            return scaled * (frobenius(u) / jnp.maximum(frobenius(scaled), TINY))

        return jax.tree.map(normalize, updates, square), RowState(square)

    return optax.GradientTransformation(init, update)


def _shape_factor(inputs: int, outputs: int) -> float:
    """Keller Jordan's. It keeps the change of an output's size the same for all shapes."""
    return max(1.0, outputs / inputs) ** 0.5


def _adam_factor(inputs: int, outputs: int) -> float:
    """Moonlight's (arXiv 2502.16982). Updates get the root mean square of AdamW's, about 0.2."""
    return 0.2 * max(inputs, outputs) ** 0.5


SCALES = {"shape": _shape_factor, "adam": _adam_factor}


def scale_by_shape(kind: str = "shape") -> optax.GradientTransformation:
    """Multiplies kernels `[in, out]` by a factor of their shape, a row of SCALES."""

    def scale(u):
        return u * SCALES[kind](*u.shape[-2:])

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))


def add_decay(
    weight_decay: float, *, cautious: bool = False, end: int = 0
) -> optax.GradientTransformation:
    """Decoupled weight decay.

    With `cautious` it acts only where update and weight agree in sign, that is, where the step
    shrinks the weight anyway (arXiv 2510.12402). It falls to zero along a cosine until step `end`.
    If `end` is 0, it is constant.
    """

    def init(params):
        return DecayState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        done = jnp.minimum(state.count / end, 1.0) if end else 0.0
        decay = weight_decay * 0.5 * (1 + jnp.cos(jnp.pi * done))

        def add(u, p):
            return u + decay * (jnp.where(u * p >= 0, p, 0.0) if cautious else p)

        return jax.tree.map(add, updates, params), DecayState(state.count + 1)

    return optax.GradientTransformation(init, update)


def make_muon(
    optim: config.Optim, group: config.Group, dtype=jnp.float32
) -> optax.GradientTransformation:
    """Muon for one group, without the learning rate and its sign.

    It chains momentum, orthogonalisation in `dtype`, row normalisation, shape factor and decay. By
    Keller Jordan's convention the decay is not multiplied by the shape factor. Raises UsageError if
    the decay falls to zero and decay_steps is not resolved, that is 0.
    """
    if optim.muon_decay_to_zero and not optim.decay_steps:
        raise UsageError(
            "config.optim.decay_steps = 0: config.optim.muon_decay_to_zero needs the step of the "
            "zero; set it, or resolve the config first"
        )

    return optax.chain(
        scale_by_muon(
            momentum_at(optim, group.b1),
            iterations=optim.muon_iterations,
            eps=group.eps,
            dtype=dtype,
        ),
        normalize_rows(group.b2) if optim.muon_normalize else optax.identity(),
        scale_by_shape(optim.muon_scale),
        add_decay(
            group.weight_decay,
            cautious=optim.muon_cautious,
            end=optim.decay_steps if optim.muon_decay_to_zero else 0,
        ),
    )
