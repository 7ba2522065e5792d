"""RoIAlign (Mask R-CNN, He et al. 2017) over the levels of a flattened feature pyramid."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hpr_jax.kernels import weighted_rows as kernel
from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.boxes import area
from hpr_jax.ops.chunks import in_chunks, out_of_chunks, zeros
from hpr_jax.ops.dispatch import dispatch
from hpr_jax.ops.weighted_rows import add_weighted_rows, weighted_rows

OPERATION = "roi_align"
# Number of regions that the XLA implementation samples at a time.
CHUNK = 16


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
    multiple: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """Features of each box, taken from the level that suits its size (FPN, Lin et al. 2017, equation 1).

    Pixel centres lie at half-integer coordinates. Sampling points more than one pixel outside of the valid area count as
    zero, and nearer ones take the values of its border. Boxes are not clipped, and no gradient flows into them.
    Differentiable in reverse mode.

    Args:
      features: `[B, S, C]`, the levels' maps flattened row by row and concatenated.
      spatial_shapes: static (height, width) of each level.
      valid_sizes: int32 `[B, L, 2]`, the valid (height, width) of each level.
      boxes: xyxy `[B, Q, 4]` in image pixels.
      strides: image pixels per feature pixel of each level.
      output_size: number of bins along each side of a box.
      sampling_ratio: number of sampling points along each side of a bin, whose mean is the bin's feature.
      finest_scale: boxes whose sides are below twice this many pixels take the first level.
      multiple: of which the number of bins is to be one; behind the box's own bins are others that are zero.
      implementation: see `hpr_jax.ops.dispatch`; None: the kernel where it can run, else XLA.

    Returns:
      `[B, Q, bins, C]`, the output_size ** 2 bins row by row, and those of zeros, in the type of `features`.

    Raises:
      ValueError: an unknown implementation, or one that cannot run.
    """
    boxes = jax.lax.stop_gradient(boxes.astype(jnp.float32))
    scale = jnp.sqrt(jnp.maximum(area(boxes), 0.0))
    level = jnp.floor(jnp.log2(scale / finest_scale + 1e-6))
    level = jnp.clip(level, 0, len(spatial_shapes) - 1).astype(jnp.int32)

    widths = jnp.array([w for _, w in spatial_shapes])
    starts = jnp.cumsum(jnp.array([0, *(h * w for h, w in spatial_shapes[:-1])]))
    stride = jnp.array(strides, jnp.float32)[level][..., None]
    regions = Regions(
        low=boxes[..., :2] / stride - 0.5,
        extent=(boxes[..., 2:] - boxes[..., :2]) / stride,
        valid=jnp.take_along_axis(valid_sizes, level[..., None], axis=1),
        width=widths[level],
        start=starts[level],
    )
    grid = Grid(output_size, sampling_ratio, -(output_size**2) % multiple)
    if 0 in (features.size, boxes.size):
        return jnp.zeros((*boxes.shape[:2], grid.bins, features.shape[-1]), features.dtype)
    features, *parts = vary_alike(features, *regions)
    return _align((grid, implementation), features, Regions(*parts))


class Grid(NamedTuple):
    """The bins of a region, and the sampling points in them.

    Attributes:
      size: number of bins along each side.
      ratio: number of sampling points along each side of a bin.
      empty: number of bins behind these that are zero.
    """

    size: int
    ratio: int
    empty: int

    @property
    def bins(self) -> int:
        """The number of all bins."""
        return self.size**2 + self.empty


class Regions(NamedTuple):
    """Boxes, each on the level that it takes: `[B, Q, ...]`, or `[R, ...]` for the R regions of a chunk.

    Attributes:
      low, extent: `[..., 2]`, top left corner and size (x, y), in pixels of the level.
      valid: int32 `[..., 2]`, (height, width) of the level's valid area.
      width: int32 `[...]`, width of the level's map.
      start: int32 `[...]`, row of the level's first pixel in the table of features.
    """

    low: jax.Array
    extent: jax.Array
    valid: jax.Array
    width: jax.Array
    start: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _align(settings, features, regions):
    grid, implementation = settings

    def pallas(features, regions, *, interpret):
        batch, tokens, channels = features.shape
        table = features.reshape(batch * tokens, channels)
        index, weight = _table_rows(regions, tokens, grid)
        out = kernel.forward(table, index, weight, interpret=interpret)
        return out.reshape(*regions.width.shape, grid.bins, channels)

    def xla(features, regions):
        return _xla(features, regions, grid)

    return dispatch(OPERATION, implementation, xla, pallas, features, regions, obstacle=_obstacle(features))


def _align_forward(settings, features, regions):
    return _align(settings, features, regions), (features, regions)


def _align_backward(settings, residuals, gradient):
    grid, implementation = settings
    features, regions = residuals

    def pallas(features, regions, gradient, *, interpret):
        batch, tokens, channels = features.shape
        index, weight = _table_rows(regions, tokens, grid)
        out = kernel.backward(batch * tokens, index, weight, gradient.reshape(-1, channels), interpret=interpret)
        return out.reshape(features.shape).astype(features.dtype)

    def xla(features, regions, gradient):
        return _xla_backward(features, regions, gradient, grid)

    arguments = features, regions, gradient
    features_gradient = dispatch(OPERATION, implementation, xla, pallas, *arguments, obstacle=_obstacle(features))
    return features_gradient, jax.tree.map(_no_gradient, regions)


_align.defvjp(_align_forward, _align_backward)


def _no_gradient(x):
    """The gradient zero of an argument, of type float0 for integers, as JAX wants it."""
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)


def _obstacle(features: jax.Array) -> str | None:
    """Why the kernel cannot take regions of these features, as `dispatch` wants it."""
    if features.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"its kernel takes float32, bfloat16 and float16, and the features are {features.dtype}"
    return None


def _table_rows(regions, tokens, grid):
    """What the bins of all images are made of: rows of the table of all images' features, `[B * S, C]`, and their weights,
    `[B * Q * bins, 4 * ratio ** 2]` each."""
    batch, queries = regions.width.shape
    flat = Regions(*(part.reshape(batch * queries, *part.shape[2:]) for part in regions))
    starts = jnp.repeat(jnp.arange(batch), queries) * tokens
    return _rows(flat._replace(start=flat.start + starts), grid)


def _xla(features, regions, grid):
    """The implementation without a kernel -> `[B, Q, bins, C]`."""
    count, channels = regions.width.shape[1], features.shape[-1]

    def per_image(args):
        table, regions = args

        def sample(chunk):
            return weighted_rows(table, *_rows(chunk, grid)).astype(table.dtype)

        sampled = jax.lax.map(sample, in_chunks(CHUNK, count, regions, mode="edge"))
        return out_of_chunks(count, sampled.reshape(sampled.shape[0], -1, grid.bins, channels))

    return jax.lax.map(per_image, (features, regions))


def _xla_backward(features, regions, gradient, grid):
    """Gradient of the features `[B, S, C]` from the gradient of the result `[B, Q, bins, C]`."""
    count, channels = regions.width.shape[1], features.shape[-1]

    def per_image(args):
        regions, gradient = args

        def step(total, chunk):
            regions, gradient = chunk
            gradient = gradient.reshape(-1, channels).astype(jnp.float32)
            index, weight = _rows(regions, grid)
            return add_weighted_rows(total, index, weight, gradient), None

        nothing = zeros(features.shape[1:], features, gradient)
        # The last chunk is filled up with copies of a region, whose rows are within the table, and gradients of zero.
        chunks = in_chunks(CHUNK, count, regions, mode="edge"), in_chunks(CHUNK, count, gradient)
        return jax.lax.scan(step, nothing, chunks)[0].astype(features.dtype)

    return jax.lax.map(per_image, (regions, gradient))


def _rows(regions, grid):
    """The results of `_samples`, with regions and bins on one axis: `[R * bins, 4 * ratio ** 2]` each."""
    index, weight = _samples(regions, grid)
    return index.reshape(-1, index.shape[-1]), weight.reshape(-1, weight.shape[-1])


def _samples(regions, grid):
    """What the bins of R regions are made of: rows of the table of features, and their weights,
    `[R, bins, 4 * ratio ** 2]` each."""
    bins, ratio, empty = grid
    steps = jnp.arange(bins * ratio) + 0.5

    def along_axis(low, extent, size):
        """The two pixels around each sampling point along one axis, and their weights: `[R, bins, ratio * 2]` each."""
        position = low[:, None] + steps * (extent / (bins * ratio))[:, None]
        size = size[:, None].astype(jnp.float32)
        inside = (position >= -1.0) & (position <= size)
        position = jnp.clip(position, 0.0, size - 1.0)
        lower = jnp.floor(position)
        upper = jnp.minimum(lower + 1.0, size - 1.0)
        fraction = position - lower
        neighbours = jnp.stack([lower, upper], axis=-1).astype(jnp.int32)
        weights = jnp.where(inside[..., None], jnp.stack([1.0 - fraction, fraction], axis=-1), 0.0)
        return neighbours.reshape(-1, bins, ratio * 2), weights.reshape(-1, bins, ratio * 2) / ratio

    columns, column_weights = along_axis(regions.low[:, 0], regions.extent[:, 0], regions.valid[:, 1])
    rows, row_weights = along_axis(regions.low[:, 1], regions.extent[:, 1], regions.valid[:, 0])
    rows = rows * regions.width[:, None, None] + regions.start[:, None, None]
    index = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    shape = (rows.shape[0], bins * bins, 4 * ratio * ratio)
    index, weight = index.reshape(shape), weight.reshape(shape)
    if not empty:
        return index, weight
    # Bins of zeros are sums of rows without weight, which the kernel does not read.
    behind = ((0, 0), (0, empty), (0, 0))
    return jnp.pad(index, behind), jnp.pad(weight, behind)
