"""OpenCV's linear resize as array operations, bit for bit, so that it can be a part of an exported program.

OpenCV computes with whole numbers: weights are multiples of 1 / 2048. Columns are mixed first, and the lowest
4 bits of their sums dropped; rows are mixed next. Halving an image in both directions is a mean of four pixels instead.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Number of steps of a weight.
_STEPS = np.float32(2048)


def resize(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Images, uint8 `[B, h, w, C]`, resized as `cv2.resize` with `INTER_LINEAR` does it: uint8 `[B, *size, C]`."""
    height, width = images.shape[1:3]
    if size == (height, width):
        return images
    levels = images.astype(jnp.int32)
    if (height, width) == (2 * size[0], 2 * size[1]):
        pairs = levels[:, ::2] + levels[:, 1::2]
        return ((pairs[:, :, ::2] + pairs[:, :, 1::2] + 2) >> 2).astype(jnp.uint8)
    left, right, left_weight, right_weight = _neighbours(width, size[1], weigh_border=False)
    mixed = (levels[:, :, left] * left_weight[:, None] + levels[:, :, right] * right_weight[:, None]) >> 4
    top, bottom, top_weight, bottom_weight = _neighbours(height, size[0], weigh_border=True)
    upper, lower = mixed[:, top] * top_weight[:, None, None], mixed[:, bottom] * bottom_weight[:, None, None]
    return (((upper >> 16) + (lower >> 16) + 2) >> 2).astype(jnp.uint8)


def _neighbours(old: int, new: int, *, weigh_border: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The two pixels that each pixel along one axis is mixed of, and their weights: int32 `[new]` each.

    Args:
      weigh_border: whether a pixel beyond the border is the one at the border, with its weight; else that pixel has all of
        the weight. It makes a difference, as each product is rounded.
    """
    scale = 1.0 / (new / old)
    place = ((np.arange(new) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int32)
    fraction = place - first.astype(np.float32)
    if not weigh_border:
        fraction = np.where((first < 0) | (first >= old - 1), np.float32(0), fraction)
    weights = (np.rint(part * _STEPS).astype(np.int32) for part in (np.float32(1) - fraction, fraction))
    return first.clip(0, old - 1), (first + 1).clip(0, old - 1), *weights
