"""Sine encodings of positions and boxes (DETR, Carion et al. 2020, section A.4; DAB-DETR, Liu et al. 2022)."""

import jax
import jax.numpy as jnp


def _sine(coordinates: jax.Array, channels: int, temperature: float) -> jax.Array:
    """`[...]` -> `[..., channels]`, sine at even and cosine at odd channels."""
    exponent = 2 * (jnp.arange(channels) // 2) / channels
    angles = coordinates[..., None] / temperature**exponent
    return jnp.where(jnp.arange(channels) % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def map_encoding(
    sizes: jax.Array, height: int, width: int, channels: int, *, temperature: float = 20.0, offset: float = 0.0
) -> jax.Array:
    """Encoding of each pixel's position relative to the valid area.

    Args:
      sizes: valid (height, width) `[B, 2]` of the map.
      channels: of the result; half encode y, half x.
      offset: added to the 1-based pixel index before it is divided by the valid size.

    Returns:
      `[B, height, width, channels]`.
    """
    batch = len(sizes)
    scale = 2 * jnp.pi / (sizes.astype(jnp.float32) + 1e-6)
    y = (jnp.arange(1, height + 1) + offset) * scale[:, :1]
    x = (jnp.arange(1, width + 1) + offset) * scale[:, 1:]
    y = _sine(y, channels // 2, temperature)[:, :, None, :]
    x = _sine(x, channels // 2, temperature)[:, None, :, :]
    shape = (batch, height, width, channels // 2)
    return jnp.concatenate([jnp.broadcast_to(y, shape), jnp.broadcast_to(x, shape)], axis=-1)


def box_encoding(boxes: jax.Array, channels: int, *, temperature: float = 10000.0) -> jax.Array:
    """Normalised cxcywh `[..., 4]` -> `[..., 4 * channels]` in the order y, x, w, h."""
    encoded = _sine(boxes[..., jnp.array([1, 0, 2, 3])] * (2 * jnp.pi), channels, temperature)
    return encoded.reshape(*boxes.shape[:-1], 4 * channels)
