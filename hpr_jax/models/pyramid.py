"""The feature pyramid, whose levels are flattened into one sequence of tokens."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from hpr_jax.ops.padding import valid_mask

# The number of tokens is a multiple of this. Matrix products of other sizes are slower on GPUs: XLA copies each of their
# operands into a larger array.
TOKENS_MULTIPLE = 8


@flax.struct.dataclass
class Pyramid:
    """A feature pyramid. Its tokens, the pixels of the levels, stand level after level, and row by row within a level.
    Behind them are a few that belong to no level, so that S is a multiple of 8.

    Attributes:
      tokens: `[B, S, C]`.
      valid: bool `[B, S]`, false where padded, and for tokens of no level.
      level_sizes: int32 `[B, L, 2]`, valid (height, width) of each level.
      image_sizes: int32 `[B, 2]`, valid (height, width) of each image in pixels.
      spatial_shapes: static (height, width) of each level.
    """

    tokens: jax.Array
    valid: jax.Array
    level_sizes: jax.Array
    image_sizes: jax.Array
    spatial_shapes: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)


def join_levels(parts: Sequence[jax.Array]) -> jax.Array:
    """What all tokens have, `[B, S, ...]`, from what those of each level have, `[B, h * w, ...]`. Tokens of no level get
    zeros."""
    missing = -sum(part.shape[1] for part in parts) % TOKENS_MULTIPLE
    fill = jnp.zeros((parts[0].shape[0], missing, *parts[0].shape[2:]), parts[0].dtype)
    return jnp.concatenate([*parts, fill], axis=1)


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
        tokens=join_levels([map_.reshape(batch, -1, channels) for map_ in features]),
        valid=join_levels(valid),
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
        centers.append(grid.reshape(size.shape[0], height * width, 2))
    return join_levels(centers)
