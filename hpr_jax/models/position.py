"""Sine encodings of pixels' positions and of boxes (DETR, Carion et al. 2020, section A.4; DAB-DETR, Liu et al. 2022)."""

import jax
import jax.numpy as jnp


def _sine(coordinates: jax.Array, channels: int, temperature: float) -> jax.Array:
    """Encoding of numbers: `[...]` -> `[..., channels]`, sines at even channels and cosines at odd ones, whose wavelengths
    grow from 2 pi to `temperature` times that."""
    exponent = 2 * (jnp.arange(channels) // 2) / channels
    angles = coordinates[..., None] / temperature**exponent
    return jnp.where(jnp.arange(channels) % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def map_encoding(
    sizes: jax.Array, height: int, width: int, channels: int, *, temperature: float = 20.0, offset: float = 0.0
) -> jax.Array:
    """Encodings of the positions of a map's pixels, relative to the valid area.

    Args:
      sizes: valid (height, width) of the map, `[B, 2]`.
      height, width: of the map.
      channels: of the result; the first half encodes y, the second x.
      temperature: ratio of the longest wavelength to the shortest.
      offset: added to the pixel's index, which counts from 1, before it is divided by the valid size.

    Returns:
      `[B, height, width, channels]`.
    """
    batch = sizes.shape[0]
    scale = 2 * jnp.pi / (sizes.astype(jnp.float32) + 1e-6)
    y = (jnp.arange(1, height + 1) + offset) * scale[:, :1]
    x = (jnp.arange(1, width + 1) + offset) * scale[:, 1:]
    y = _sine(y, channels // 2, temperature)[:, :, None, :]
    x = _sine(x, channels // 2, temperature)[:, None, :, :]
    shape = (batch, height, width, channels // 2)
    return jnp.concatenate([jnp.broadcast_to(y, shape), jnp.broadcast_to(x, shape)], axis=-1)


def box_encoding(boxes: jax.Array, channels: int, *, temperature: float = 10000.0) -> jax.Array:
    """Encodings of normalised cxcywh boxes: `[..., 4]` -> `[..., 4 * channels]`, in the order y, x, w, h."""
    encoded = _sine(boxes[..., jnp.array([1, 0, 2, 3])] * (2 * jnp.pi), channels, temperature)
    return encoded.reshape(*boxes.shape[:-1], 4 * channels)
