"""Rotary and sinusoidal positions."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config


def rotary_frequencies(model: config.Model) -> np.ndarray:
    """Radians per position [R / 2] for the R = rope_fraction * head_dim rotating channels (Su et
    al. 2021), with Llama-3's scaling of the long wavelengths where `rope_scale_factor` > 1."""
    rotating = int(model.head_dim * model.rope_fraction)
    frequencies = model.rope_base ** -(np.arange(0, rotating, 2, dtype=np.float64) / rotating)
    if model.rope_scale_factor > 1:
        turns = (
            model.rope_scale_original_seq * frequencies / (2 * np.pi)
        )  # over the original context
        smooth = (turns - model.rope_scale_low) / (model.rope_scale_high - model.rope_scale_low)
        smooth = np.clip(smooth, 0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / model.rope_scale_factor)
    return frequencies.astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first channels of x [B, T, N, H] by angles whose cos and sin are [B or 1, T, R
    / 2], in float32. Channel i pairs with i + R / 2 (the layout of GPT-NeoX and Hugging Face's
    Llama)."""
    half = cos.shape[-1]
    cos, sin = (jnp.concatenate(parts, -1)[:, :, None] for parts in ((cos, cos), (-sin, sin)))
    turning, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    turned = (turning * cos + jnp.roll(turning, half, -1) * sin).astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)


def sinusoids(position: jax.Array, width: int) -> jax.Array:
    """Vaswani et al. 2017: [B or 1, T] positions -> [B or 1, T, width], sines then cosines."""
    rates = np.float32(10_000.0) ** -(np.arange(0, width, 2, dtype=np.float32) / width)
    angles = position[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
