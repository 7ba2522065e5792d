"""Valid areas of padded images and feature maps.

Images are padded at the right and at the bottom to the static shape of a bucket. `sizes` below are the valid (height, width)
of each image, int32 `[B, 2]`, in pixels of the array that they belong to.
"""

import jax
import jax.numpy as jnp


def halve(sizes: jax.Array) -> jax.Array:
    """Valid sizes behind a convolution or pooling of stride 2, which turns n pixels into ceil(n / 2)."""
    return (sizes + 1) // 2


def valid_mask(sizes: jax.Array, height: int, width: int) -> jax.Array:
    """Which pixels are inside the valid areas: `[B, 2]` -> bool `[B, height, width, 1]`."""
    rows = jnp.arange(height)[None, :, None] < sizes[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < sizes[:, 1, None, None]
    return (rows & columns)[..., None]


def zero_padding(features: jax.Array, sizes: jax.Array) -> jax.Array:
    """Features `[B, h, w, C]` with zeros outside the valid areas, whatever was there."""
    _, height, width, _ = features.shape
    return jnp.where(valid_mask(sizes, height, width), features, 0)
