"""RoIAlign (Mask R-CNN, He et al. 2017) over the levels of a flattened feature pyramid."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hpr_jax.ops.boxes import area
from hpr_jax.ops.deform_attn import weighted_rows

# Regions sampled at a time; bounds the gathered rows to a few hundred MB at 256 channels.
CHUNK = 128


def roi_align(
    features: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    valid_sizes: jax.Array,
    boxes: jax.Array,
    *,
    strides: Sequence[int] = (8, 16, 32, 64),
    output_size: int = 7,
    sampling_ratio: int = 2,
    finest_scale: float = 56.0,
) -> jax.Array:
    """Features of each box on the level that suits its size (FPN, Lin et al. 2017, equation 1).

    Half-pixel aligned; samples beyond the valid area by more than one pixel count as zero, nearer ones take the border.
    Boxes are neither clipped nor differentiated.

    Args:
      features: `[B, S, C]`, the levels' maps flattened row by row and concatenated.
      spatial_shapes: static (height, width) of each level.
      valid_sizes: int32 `[B, L, 2]`, the valid (height, width) of each level.
      boxes: xyxy `[B, Q, 4]` in image pixels.
      strides: image pixels per feature pixel of each level.
      sampling_ratio: samples per bin and axis.
      finest_scale: boxes with sides below twice this many pixels take the first level.

    Returns:
      `[B, Q, output_size ** 2, C]`, bins row by row.
    """
    batch, _, channels = features.shape
    queries = boxes.shape[1]
    boxes = jax.lax.stop_gradient(boxes.astype(jnp.float32))
    scale = jnp.sqrt(jnp.maximum(area(boxes), 0.0))
    level = jnp.floor(jnp.log2(scale / finest_scale + 1e-6))
    level = jnp.clip(level, 0, len(spatial_shapes) - 1).astype(jnp.int32)

    widths = jnp.array([w for _, w in spatial_shapes])
    starts = jnp.cumsum(jnp.array([0, *(h * w for h, w in spatial_shapes[:-1])]))
    low = boxes[..., :2] / jnp.array(strides, jnp.float32)[level][..., None] - 0.5
    extent = (boxes[..., 2:] - boxes[..., :2]) / jnp.array(strides, jnp.float32)[level][..., None]
    valid = jnp.take_along_axis(valid_sizes, level[..., None], axis=1)

    chunk = min(CHUNK, queries)
    chunks = -(-queries // chunk)

    def chunked(array):
        padding = [(0, 0), (0, chunks * chunk - queries)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(array, padding, mode="edge").reshape(batch, chunks, chunk, *array.shape[2:])

    @jax.checkpoint
    def sample(table, low, extent, valid, width, start):
        index, weight = _samples(low, extent, valid, width, start, output_size, sampling_ratio)
        rows = weighted_rows(table, index.reshape(-1, index.shape[-1]), weight.reshape(-1, weight.shape[-1]))
        return rows.reshape(chunk, output_size**2, channels)

    def per_image(args):
        table, *regions = args
        return jax.lax.map(lambda r: sample(table, *r), tuple(regions))

    regions = (low, extent, valid, widths[level], starts[level])
    out = jax.lax.map(per_image, (features, *map(chunked, regions)))
    return out.reshape(batch, chunks * chunk, output_size**2, channels)[:, :queries]


def _samples(low, extent, valid, width, start, bins, ratio):
    """Table rows and weights of every bin: `[R, bins ** 2, 4 * ratio ** 2]` each."""
    steps = (jnp.arange(bins * ratio) + 0.5) / (bins * ratio)

    def axis(low, extent, size):
        # -> neighbours and their weights [R, bins, ratio * 2]
        position = low[:, None] + steps * extent[:, None]
        size = size[:, None].astype(jnp.float32)
        inside = (position >= -1.0) & (position <= size)
        position = jnp.clip(position, 0.0, size - 1.0)
        lower = jnp.floor(position)
        upper = jnp.minimum(lower + 1.0, size - 1.0)
        fraction = position - lower
        neighbours = jnp.stack([lower, upper], axis=-1).astype(jnp.int32)
        weights = jnp.where(inside[..., None], jnp.stack([1.0 - fraction, fraction], axis=-1), 0.0)
        return neighbours.reshape(-1, bins, ratio * 2), weights.reshape(-1, bins, ratio * 2) / ratio

    columns, column_weights = axis(low[:, 0], extent[:, 0], valid[:, 1])
    rows, row_weights = axis(low[:, 1], extent[:, 1], valid[:, 0])
    rows = rows * width[:, None, None] + start[:, None, None]
    index = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    shape = (len(low), bins * bins, 4 * ratio * ratio)
    return index.reshape(shape), weight.reshape(shape)
