"""Multi-scale deformable sampling (Deformable DETR, Zhu et al. 2021, equation 3, without the projections)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hpr_jax.kernels import deformable_sampling as kernel
from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.chunks import in_chunks, out_of_chunks, zeros
from hpr_jax.ops.dispatch import dispatch
from hpr_jax.ops.grid_sample import grid_sample
from hpr_jax.ops.platform import target_platform
from hpr_jax.ops.weighted_rows import add_weighted_rows, weighted_rows

Shapes = tuple[tuple[int, int], ...]

OPERATION = "deformable_sampling"
# Number of queries whose rows the XLA backward pass gathers and adds at a time.
CHUNK = 192


def deformable_sampling(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Weighted sums of bilinearly interpolated values, with zeros outside of each level's map.

    Sums are computed in float32, whatever the types of the arguments. Differentiable in reverse mode.

    Args:
      value: `[B, S, H, D]`, the levels' maps flattened row by row and concatenated.
      spatial_shapes: static (height, width) of each level; tokens behind theirs are not sampled.
      sampling_locations: `[B, Q, H, L, P, 2]`, (x, y) relative to each level's map, whose outer edges are 0 and 1.
      attention_weights: `[B, Q, H, L, P]`.
      implementation: see `hpr_jax.ops.dispatch`; None: the kernel where it can run, else XLA.

    Returns:
      `[B, Q, H * D]` in the type of `value`.

    Raises:
      ValueError: an unknown implementation or one that cannot run, or shapes that do not fit one another.
    """
    shapes = tuple((int(height), int(width)) for height, width in spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    batch, _, heads, width = value.shape
    queries = sampling_locations.shape[1]
    if 0 in (value.size, attention_weights.size):
        return jnp.zeros((batch, queries, heads * width), value.dtype)
    locations, weights = (array.astype(jnp.float32) for array in (sampling_locations, attention_weights))
    out = _sample(shapes, implementation, *vary_alike(value, locations, weights))
    return out.reshape(batch, queries, heads * width)


def _check(value: jax.Array, spatial_shapes: Shapes, locations: jax.Array, weights: jax.Array) -> None:
    if value.ndim != 4 or locations.ndim != 6 or locations.shape[:-1] != weights.shape or locations.shape[-1] != 2:
        raise ValueError(
            "deformable_sampling takes value [B, S, H, D], locations [B, Q, H, L, P, 2] and weights [B, Q, H, L, P], not "
            f"{list(value.shape)}, {list(locations.shape)} and {list(weights.shape)}."
        )
    tokens, levels = value.shape[1], locations.shape[3]
    if (value.shape[0], value.shape[2]) != (locations.shape[0], locations.shape[2]):
        raise ValueError(f"value {list(value.shape)} and locations {list(locations.shape)} differ in their batch or heads.")
    if tokens < sum(h * w for h, w in spatial_shapes) or levels != len(spatial_shapes):
        raise ValueError(f"value has {tokens} tokens and locations {levels} levels, but the maps are {spatial_shapes}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sample(spatial_shapes, implementation, value, locations, weights):
    return dispatch(
        OPERATION,
        implementation,
        functools.partial(_xla, spatial_shapes),
        functools.partial(kernel.forward, spatial_shapes=spatial_shapes),
        value,
        locations,
        weights,
        obstacle=_obstacle(value),
    )


def _sample_forward(spatial_shapes, implementation, *arguments):
    return _sample(spatial_shapes, implementation, *arguments), arguments


def _sample_backward(spatial_shapes, implementation, arguments, gradient):
    value = arguments[0]

    def pallas(value, locations, weights, gradient, *, interpret):
        value_gradient, *others = kernel.backward(
            value, locations, weights, gradient, spatial_shapes=spatial_shapes, interpret=interpret
        )
        return value_gradient.astype(value.dtype), *others

    xla = functools.partial(_xla_backward, spatial_shapes)
    return dispatch(OPERATION, implementation, xla, pallas, *arguments, gradient, obstacle=_obstacle(value))


_sample.defvjp(_sample_forward, _sample_backward)


def _obstacle(value: jax.Array) -> str | None:
    """Why the kernel cannot sample this value, as `dispatch` wants it."""
    width, dtype = value.shape[-1], value.dtype
    if width > kernel.MAX_WIDTH:
        return f"its kernel takes heads of at most {kernel.MAX_WIDTH} channels, and these have {width}"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"its kernel takes float32, bfloat16 and float16, and the values are {dtype}"
    return None


def _xla(spatial_shapes, value, locations, weights):
    """The implementation without a kernel -> `[B, Q, H, D]`."""
    if target_platform() == "onnx":
        return _by_maps(spatial_shapes, value, locations, weights)

    # One head of one image at a time: its table [S, D] fits the cache, and only one table of indices exists at once.
    def sample_head(args):
        table, locations, weights = args
        return weighted_rows(table, *_corners(spatial_shapes, locations, weights)).astype(value.dtype)

    return _by_image(jax.lax.map(sample_head, jax.tree.map(_by_head, (value, locations, weights))), value.shape[0])


def _by_maps(spatial_shapes, value, locations, weights):
    """The same as an operation that ONNX has, on one level after the other."""
    batch, _, heads, width = value.shape
    total, start = jnp.float32(0), 0
    for level, (rows, columns) in enumerate(spatial_shapes):
        maps = value[:, start : start + rows * columns].transpose(0, 2, 3, 1).reshape(batch * heads, width, rows, columns)
        # Queries are the last axis, along which ONNX Runtime adds many numbers at once.
        grid = 2 * locations[:, :, :, level].transpose(0, 2, 3, 1, 4) - 1
        sampled = grid_sample(maps.astype(jnp.float32), grid.reshape(batch * heads, *grid.shape[2:]))
        weight = weights[:, :, :, level].transpose(0, 2, 3, 1).reshape(batch * heads, 1, *grid.shape[2:4])
        total += jnp.sum(sampled * weight, axis=2)
        start += rows * columns
    return total.reshape(batch, heads, width, -1).transpose(0, 3, 1, 2).astype(value.dtype)


def _xla_backward(spatial_shapes, value, locations, weights, gradient):
    """Gradients of value, locations and weights from the gradient of the result, `[B, Q, H, D]`."""
    queries = locations.shape[1]

    def head_gradients(args):
        table, locations, weights, gradient = args
        table = table.astype(jnp.float32)

        def corners(*arguments):
            index, weight = _corners(spatial_shapes, *arguments)
            return weight, index

        weight, pullback, index = jax.vjp(corners, locations, weights, has_aux=True)

        # Only the rows are gathered chunk by chunk. Indices and weights are so small that an operation on a chunk of them
        # would take less time than starting it.
        def step(table_gradient, chunk):
            index, weight, gradient = chunk
            gradient = gradient.astype(jnp.float32)
            weight_gradient = jnp.einsum("nkd,nd->nk", table.at[index].get(mode="promise_in_bounds"), gradient)
            return add_weighted_rows(table_gradient, index, weight, gradient), weight_gradient

        chunks = in_chunks(CHUNK, queries, (index, weight, gradient))
        table_gradient, weight_gradient = jax.lax.scan(step, zeros(table.shape, *args), chunks)
        return table_gradient.astype(value.dtype), *pullback(out_of_chunks(queries, weight_gradient))

    found = jax.lax.map(head_gradients, jax.tree.map(_by_head, (value, locations, weights, gradient)))
    return jax.tree.map(lambda array: _by_image(array, value.shape[0]), found)


def _by_head(array):
    """`[B, N, H, ...]` -> `[B * H, N, ...]`."""
    moved = jnp.moveaxis(array, 2, 1)
    return moved.reshape(-1, *moved.shape[2:])


def _by_image(array, batch):
    """The inverse of `_by_head`."""
    return jnp.moveaxis(array.reshape(batch, -1, *array.shape[1:]), 1, 2)


def _corners(spatial_shapes, locations, weights):
    """The four pixels around each sampling point of one head: their rows in the table of values, and their weights.

    Args:
      locations: `[Q, L, P, 2]`.
      weights: `[Q, L, P]`.

    Returns:
      Rows int32 and weights float32, `[Q, L * P * 4]` each; pixels outside of the map have the weight 0.
    """
    indices, corner_weights = [], []
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        x = locations[:, level, :, 0] * width - 0.5
        y = locations[:, level, :, 1] * height - 0.5
        x0, y0 = jnp.floor(x), jnp.floor(y)
        for dx, wx in ((0, 1.0 - (x - x0)), (1, x - x0)):
            for dy, wy in ((0, 1.0 - (y - y0)), (1, y - y0)):
                column, row = x0 + dx, y0 + dy
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                column, row = jnp.clip(column, 0, width - 1), jnp.clip(row, 0, height - 1)
                indices.append(start + (row * width + column).astype(jnp.int32))
                corner_weights.append(jnp.where(inside, wx * wy, 0.0) * weights[:, level])
        start += height * width
    return jnp.concatenate(indices, axis=-1), jnp.concatenate(corner_weights, axis=-1)
