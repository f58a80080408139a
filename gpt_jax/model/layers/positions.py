"""Rotary and sinusoidal positions.

Shapes: B batch, T sequence, N heads, H head_dim, R rotating channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, sharding


def rotary_frequencies(model: config.Model, is_local: bool = False) -> np.ndarray:
    """Computes the radians per position [R / 2] of rotary positions (Su et al. 2021).

    R = rope_fraction * head_dim channels rotate. Where `rope_scale_factor` is above 1, the
    frequencies are scaled by the row `rope_scaling`. `is_local` gives those of layers with a
    window, in a model whose `rope_local_base` is set.
    """
    rotating = int(model.head_dim * model.rope_fraction)
    base = model.rope_local_base if is_local else model.rope_base
    frequencies = base ** -(np.arange(0, rotating, 2, dtype=np.float64) / rotating)
    if model.rope_scale_factor > 1 and not is_local:
        frequencies = SCALINGS[model.rope_scaling](model, frequencies)
    return frequencies.astype(np.float32)


def _scale_long_wavelengths(model: config.Model, frequencies):
    """As in Llama 3: a channel that turns often over the original context keeps its frequency."""
    turns = model.rope_scale_original_seq * frequencies / (2 * np.pi)
    smooth = (turns - model.rope_scale_low) / (model.rope_scale_high - model.rope_scale_low)
    smooth = np.clip(smooth, 0, 1)
    return frequencies * (smooth + (1 - smooth) / model.rope_scale_factor)


def _scale_all(model: config.Model, frequencies):
    """Position interpolation (Chen et al. 2023)."""
    return frequencies / model.rope_scale_factor


SCALINGS = {"llama3": _scale_long_wavelengths, "linear": _scale_all}


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first R channels of x [B, T, N, H] in float32.

    The angles are given by their cos and sin [B or 1, T, R / 2]. Channel i pairs with i + R / 2,
    which is the layout of GPT-NeoX and of Hugging Face's Llama.
    """
    # A matmul rounds its inputs to bfloat16 on a TPU, so that other types lose digits by it.
    if sharding.habits().rotate_by_matmul and x.dtype == jnp.bfloat16:
        return rotate_by_matmul(x, cos, sin)
    return rotate_by_slices(x, cos, sin)


def rotate_by_slices(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Does what `rotate` says. Channels come to their partners by slicing and joining."""
    half = cos.shape[-1]
    signed = (-sin, sin)  # the first half of the channels subtracts, the second adds
    cos = jnp.concatenate((cos, cos), -1)[:, :, None]
    sin = jnp.concatenate(signed, -1)[:, :, None]

    turning = x[..., : 2 * half].astype(jnp.float32)
    rest = x[..., 2 * half :]
    turned = (turning * cos + jnp.roll(turning, half, -1) * sin).astype(x.dtype)
    if rest.shape[-1] == 0:
        return turned
    return jnp.concatenate([turned, rest], axis=-1)


@jax.custom_vjp
def rotate_by_matmul(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Does what `rotate` says for x in bfloat16. Channels come to their partners by a matmul.

    The matrix has a single 1 for each channel that rotates, so that the matmul is exact. One
    infinite channel makes the others of its head NaN, as it makes the head's scores.

    The angles get no gradient.
    """
    width = x.shape[-1]
    half = cos.shape[-1]
    beyond = ((0, 0), (0, 0), (0, width - 2 * half))  # channels that do not rotate
    cos = jnp.pad(jnp.concatenate((cos, cos), -1), beyond, constant_values=1)[:, :, None]
    sin = jnp.pad(jnp.concatenate((-sin, sin), -1), beyond)[:, :, None]

    partners = np.zeros((1, width, width), np.float32)
    partners[0, : 2 * half, : 2 * half] = np.roll(np.eye(2 * half), half, axis=1)
    # The batch dim of one keeps the policies of remat from storing this matmul's result.
    partner = jnp.einsum("zbtnh,zhr->zbtnr", x[None], jnp.asarray(partners, x.dtype))[0]
    turned = x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin
    return turned.astype(x.dtype)


def _rotate_forward(x, cos, sin):
    return rotate_by_matmul(x, cos, sin), (cos, sin)


def _rotate_back(angles, gradient):
    """Rotates the gradient back, which keeps this matmul's input in bfloat16 too."""
    cos, sin = angles
    return rotate_by_matmul(gradient, cos, -sin), None, None


rotate_by_matmul.defvjp(_rotate_forward, _rotate_back)


def sinusoids(position: jax.Array, width: int) -> jax.Array:
    """Turns positions [B or 1, T] into sines, then cosines [B or 1, T, width].

    The rates are those of Vaswani et al. 2017.
    """
    rates = np.float32(10_000.0) ** -(np.arange(0, width, 2, dtype=np.float32) / width)
    angles = position[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
