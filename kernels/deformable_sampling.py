"""Multi-scale deformable sampling (Deformable DETR, Zhu et al. 2021, equation 3) and its gradients.

A row is one head of one query. A program works on a block of rows of one image, and holds the channels of a row side by
side: a corner (one of the four pixels around a sampling point) is one load of `width` neighbouring channels. The kernels
compute in float32, whatever the type of `value`.

Shapes: `value` `[B, S, H, D]`, `locations` `[B, Q, H, L, P, 2]`, `weights` `[B, Q, H, L, P]`, as in
`hpr_jax.ops.deformable_sampling`; locations and weights are float32.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hpr_jax.kernels.launch import Launch, pallas_call, power_of_two, zeros_after
from hpr_jax.kernels.relaxed_add import relaxed_add

# Largest number of channels D of a head.
MAX_WIDTH = 128
# A thread of the forward kernel handles eight channels: loads of 16 bytes (in bfloat16), the widest there are.
FORWARD = Launch(num_warps=2, elements=8)
# A thread of the backward kernel handles four channels: additions of 16 bytes (in float32), the widest there are. With
# eight, every corner in bfloat16 would move from the threads that loaded it to those that add it, through shared memory and
# two barriers.
BACKWARD = Launch(num_warps=2, elements=4)


def forward(
    value: jax.Array,
    locations: jax.Array,
    weights: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    *,
    launch: Launch = FORWARD,
    interpret: bool = False,
) -> jax.Array:
    """Weighted sums of sampled values: `[B, Q, H, D]` in the type of `value`."""
    batch, queries, heads, levels, points, _ = locations.shape
    width, rows = value.shape[-1], queries * heads
    block = launch.block(width)
    kernel = functools.partial(_forward, geometry=_Geometry(value, locations, spatial_shapes, block))
    out = pallas_call(
        kernel,
        out_shape=[((batch * rows, width), value.dtype)],
        grid=(pl.cdiv(rows, block), batch),
        launch=launch,
        interpret=interpret,
        name="deformable_sampling_forward",
        # Each point is a weighted sum of four rows.
        flops=2 * 4 * weights.size * width,
    )(*_flat(value, locations, weights))[0]
    return out.reshape(batch, queries, heads, width)


def backward(
    value: jax.Array,
    locations: jax.Array,
    weights: jax.Array,
    gradient: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    *,
    launch: Launch = BACKWARD,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `value`, `locations` and `weights`, all float32, from the gradient of the output, `[B, Q, H, D]`.

    The gradient of `value` is summed in an order that changes from run to run, as in the original CUDA operator.
    """
    batch, queries, heads, levels, points, _ = locations.shape
    width, rows = value.shape[-1], queries * heads
    block = launch.block(width)
    flat_value, flat_locations, flat_weights = _flat(value, locations, weights)
    zeros, gradient = zeros_after(gradient, flat_value.shape)
    kernel = functools.partial(_backward, geometry=_Geometry(value, locations, spatial_shapes, block))
    grad_value, grad_locations, grad_weights = pallas_call(
        kernel,
        out_shape=[(zeros.shape, jnp.float32), (flat_locations.shape, jnp.float32), (flat_weights.shape, jnp.float32)],
        grid=(pl.cdiv(rows, block), batch),
        input_output_aliases={4: 0},
        launch=launch,
        interpret=interpret,
        name="deformable_sampling_backward",
        # Each of the four rows around a point is multiplied with the gradient, which is added to a row.
        flops=2 * 2 * 4 * weights.size * width,
    )(flat_value, flat_locations, flat_weights, gradient.reshape(batch * rows, width), zeros)
    return grad_value.reshape(value.shape), grad_locations.reshape(locations.shape), grad_weights.reshape(weights.shape)


def _flat(value, locations, weights):
    """The arrays as tables of rows: `[B * S * H, D]`, `[B * Q * H, 2 * L * P]`, `[B * Q * H, L * P]`."""
    batch, queries, heads, levels, points, _ = locations.shape
    rows, samples = batch * queries * heads, levels * points
    return value.reshape(-1, value.shape[-1]), locations.reshape(rows, 2 * samples), weights.reshape(rows, samples)


class _Geometry:
    """The sizes that a kernel is compiled for, and the indices that follow from them inside it."""

    def __init__(self, value, locations, spatial_shapes, block):
        _, self.tokens, self.heads, self.width = value.shape
        _, queries, _, _, self.points, _ = locations.shape
        self.rows, self.block, self.spatial_shapes = queries * self.heads, block, tuple(spatial_shapes)
        self.samples = self.points * len(self.spatial_shapes)

    def indices(self):
        """What this program works on: rows of the tables of locations and weights, whether each exists, their heads,
        `[block]` each; channels `[D]`; whether each pair of row and channel exists `[block, D]`."""
        within = pl.program_id(0) * self.block + jnp.arange(self.block)
        channel = jnp.arange(power_of_two(self.width))
        live = within < self.rows
        row = pl.program_id(1) * self.rows + within
        return row, live, within % self.heads, channel, live[:, None] & (channel < self.width)[None, :]

    def levels(self):
        """Of each level its index, the row of the table of values where it starts in this image, its height and width."""
        start = 0
        for level, (height, width) in enumerate(self.spatial_shapes):
            yield level, (pl.program_id(1) * self.tokens + start) * self.heads, height, width
            start += height * width


def _corners(x, y, height, width):
    """The four pixels around pixel coordinates: of each its row-major index, whether it is inside the map, and its weights
    along x and along y."""
    x0, y0 = jnp.floor(x), jnp.floor(y)
    for dy, weight_y in ((0, 1.0 - (y - y0)), (1, y - y0)):
        for dx, weight_x in ((0, 1.0 - (x - x0)), (1, x - x0)):
            column, row = x0 + dx, y0 + dy
            # Compared as floats, since integers would overflow far outside.
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            # Everything is zero outside, and where a location is not finite.
            pixel, *weights = (jnp.where(inside, x, 0.0) for x in (row * width + column, weight_x, weight_y))
            yield pixel.astype(jnp.int32), inside, *weights


def _sample(locations, weights, row, live, sample, height, width):
    """Pixel coordinates and weight of one sampling point of each row: `[block]` each."""
    x = plt.load(locations.at[row, 2 * sample], mask=live, other=0.0) * width - 0.5
    y = plt.load(locations.at[row, 2 * sample + 1], mask=live, other=0.0) * height - 0.5
    return x, y, plt.load(weights.at[row, sample], mask=live, other=0.0)


def _forward(value, locations, weights, out, *, geometry):
    row, live, head, channel, exists = geometry.indices()
    total = jnp.zeros(exists.shape, jnp.float32)
    for level, start, height, width in geometry.levels():

        def add_point(point, total, level=level, start=start, height=height, width=width):
            x, y, weight = _sample(locations, weights, row, live, level * geometry.points + point, height, width)
            for pixel, inside, weight_x, weight_y in _corners(x, y, height, width):
                source = start + pixel * geometry.heads + head
                corner = plt.load(value.at[source[:, None], channel[None, :]], mask=inside[:, None] & exists, other=0)
                total += (weight * weight_x * weight_y)[:, None] * corner.astype(jnp.float32)
            return total

        total = jax.lax.fori_loop(0, geometry.points, add_point, total)
    plt.store(out.at[row[:, None], channel[None, :]], total.astype(out.dtype), mask=exists)


def _backward(value, locations, weights, gradient, _, grad_value, grad_locations, grad_weights, *, geometry):
    row, live, head, channel, exists = geometry.indices()
    gradient = plt.load(gradient.at[row[:, None], channel[None, :]], mask=exists, other=0).astype(jnp.float32)
    # The gradients of locations and weights are collected in registers, and stored together at the end.
    column = jnp.arange(power_of_two(geometry.samples))
    column2 = jnp.arange(2 * power_of_two(geometry.samples))
    weight_sums = jnp.zeros((geometry.block, column.size), jnp.float32)
    location_sums = jnp.zeros((geometry.block, column2.size), jnp.float32)
    for level, start, height, width in geometry.levels():

        def add_point(point, sums, level=level, start=start, height=height, width=width):
            weight_sums, location_sums = sums
            sample = level * geometry.points + point
            x, y, weight = _sample(locations, weights, row, live, sample, height, width)
            weight_gradient = x_gradient = y_gradient = jnp.zeros(geometry.block, jnp.float32)
            for corner, (pixel, inside, weight_x, weight_y) in enumerate(_corners(x, y, height, width)):
                place = ((start + pixel * geometry.heads + head)[:, None], channel[None, :])
                mask = inside[:, None] & exists
                loaded = plt.load(value.at[place], mask=mask, other=0).astype(jnp.float32)
                product = jnp.sum(loaded * gradient, axis=1)
                weight_gradient += weight_x * weight_y * product
                x_gradient += (2 * (corner % 2) - 1) * weight_y * product
                y_gradient += (2 * (corner // 2) - 1) * weight_x * product
                relaxed_add(grad_value, place, (weight * weight_x * weight_y)[:, None] * gradient, mask)
            weight_sums = jnp.where(column[None, :] == sample, weight_gradient[:, None], weight_sums)
            x_gradient, y_gradient = x_gradient * weight * width, y_gradient * weight * height
            location_sums = jnp.where(column2[None, :] == 2 * sample, x_gradient[:, None], location_sums)
            location_sums = jnp.where(column2[None, :] == 2 * sample + 1, y_gradient[:, None], location_sums)
            return weight_sums, location_sums

        weight_sums, location_sums = jax.lax.fori_loop(0, geometry.points, add_point, (weight_sums, location_sums))
    for ref, columns, sums in ((grad_weights, column, weight_sums), (grad_locations, column2, location_sums)):
        mask = live[:, None] & (columns < ref.shape[1])[None, :]
        plt.store(ref.at[row[:, None], columns[None, :]], sums, mask=mask)
