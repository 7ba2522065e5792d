"""Bilinear sampling of maps as one operation, which ONNX has as `GridSample`."""

from typing import Final

import jax
from jax.scipy.ndimage import map_coordinates

# The name by which the translation to ONNX knows calls of `grid_sample`.
NAME: Final = "hpr_jax_grid_sample"


def _grid_sample(maps: jax.Array, grid: jax.Array) -> jax.Array:
    height, width = maps.shape[-2:]

    def sample(channel, grid):
        x, y = (((grid[..., axis] + 1) * size - 1) / 2 for axis, size in enumerate((width, height)))
        return map_coordinates(channel, [y, x], order=1, mode="constant", cval=0.0)

    return jax.vmap(jax.vmap(sample, in_axes=(0, None)))(maps, grid)


_grid_sample.__name__ = NAME
_jitted = jax.jit(_grid_sample)


def grid_sample(maps: jax.Array, grid: jax.Array) -> jax.Array:
    """Bilinearly interpolated values, with zeros outside of the maps.

    It is what ONNX makes of it that counts: as XLA operations it is slower than what `deformable_sampling` does.

    Args:
      maps: `[N, C, h, w]`.
      grid: `[N, R, P, 2]`, (x, y) relative to the maps, whose outer edges are -1 and 1.

    Returns:
      `[N, C, R, P]`.
    """
    return _jitted(maps, grid)
