"""The feature pyramid, whose levels are flattened into one sequence of tokens."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from hpr_jax.ops.padding import valid_mask


@flax.struct.dataclass
class Pyramid:
    """A feature pyramid. Its tokens, the pixels of the levels, stand level after level, and row by row within a level.

    Attributes:
      tokens: `[B, S, C]`.
      valid: bool `[B, S]`, false where padded.
      level_sizes: int32 `[B, L, 2]`, valid (height, width) of each level.
      image_sizes: int32 `[B, 2]`, valid (height, width) of each image in pixels.
      spatial_shapes: static (height, width) of each level.
    """

    tokens: jax.Array
    valid: jax.Array
    level_sizes: jax.Array
    image_sizes: jax.Array
    spatial_shapes: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)


def flatten(features: Sequence[jax.Array], sizes: Sequence[jax.Array], image_sizes: jax.Array) -> Pyramid:
    """The pyramid of some maps.

    Args:
      features: the maps of the levels, `[B, h, w, C]`.
      sizes: int32 `[B, 2]` for each level, valid (height, width) of its map.
      image_sizes: int32 `[B, 2]`, valid (height, width) of the images in pixels.
    """
    batch, channels = features[0].shape[0], features[0].shape[-1]
    shapes = tuple((map_.shape[1], map_.shape[2]) for map_ in features)
    valid = [valid_mask(size, h, w).reshape(batch, h * w) for size, (h, w) in zip(sizes, shapes)]
    return Pyramid(
        tokens=jnp.concatenate([map_.reshape(batch, -1, channels) for map_ in features], axis=1),
        valid=jnp.concatenate(valid, axis=1),
        level_sizes=jnp.stack(sizes, axis=1),
        image_sizes=image_sizes,
        spatial_shapes=shapes,
    )


def pixel_centers(pyramid: Pyramid) -> jax.Array:
    """Centres (x, y) of the tokens' pixels, normalised to the valid areas of their levels: `[B, S, 2]`."""
    centers = []
    for level, (height, width) in enumerate(pyramid.spatial_shapes):
        size = pyramid.level_sizes[:, level].astype(jnp.float32)
        y = (jnp.arange(height) + 0.5) / size[:, :1]
        x = (jnp.arange(width) + 0.5) / size[:, 1:]
        grid = jnp.stack(jnp.broadcast_arrays(x[:, None, :], y[:, :, None]), axis=-1)
        centers.append(grid.reshape(len(size), height * width, 2))
    return jnp.concatenate(centers, axis=1)
