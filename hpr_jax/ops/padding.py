"""Valid areas of padded images and feature maps.

Images are padded at the right and bottom to a bucket's static shape. `sizes` below are the valid (height, width) of
each image in the units of the array at hand, int32 `[B, 2]`.
"""

import jax
import jax.numpy as jnp


def halve(sizes: jax.Array) -> jax.Array:
    """Valid size behind a stride-2 convolution or pooling, whose output has ceil(n / 2) positions."""
    return (sizes + 1) // 2


def valid_mask(sizes: jax.Array, height: int, width: int) -> jax.Array:
    """True inside the valid area: `[B, 2]` -> bool `[B, height, width, 1]`."""
    rows = jnp.arange(height)[None, :, None] < sizes[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < sizes[:, 1, None, None]
    return (rows & columns)[..., None]


def zero_padding(features: jax.Array, sizes: jax.Array) -> jax.Array:
    """Sets what lies outside the valid area of `features` `[B, h, w, C]` to zero."""
    _, height, width, _ = features.shape
    return jnp.where(valid_mask(sizes, height, width), features, 0)
