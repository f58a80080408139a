"""Rotary and sinusoidal positions.

Shapes: B batch, T sequence, N heads, H head_dim, R rotating channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config


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


def sinusoids(position: jax.Array, width: int) -> jax.Array:
    """Turns positions [B or 1, T] into sines, then cosines [B or 1, T, width].

    The rates are those of Vaswani et al. 2017.
    """
    rates = np.float32(10_000.0) ** -(np.arange(0, width, 2, dtype=np.float32) / width)
    angles = position[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
