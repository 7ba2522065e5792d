"""Weighted sums of a table's rows, `out[n] = sum_k weights[n, k] * table[index[n, k]]`, and the gradient of the table.

XLA would write the gathered rows to memory and read them again; the kernel holds them in registers. It computes in float32,
whatever the type of the table, and leaves out rows of weight zero.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hpr_jax.kernels.launch import Launch, pallas_call, power_of_two, zeros_after
from hpr_jax.kernels.relaxed_add import relaxed_add

# Number of channels that one program works on; wider tables take several programs.
TILE = 256
# A thread of the forward kernel handles eight channels: loads of 16 bytes (in bfloat16), the widest there are.
FORWARD = Launch(num_warps=2, elements=8)
# A thread of the backward kernel handles four channels: additions of 16 bytes (in float32), the widest there are.
BACKWARD = Launch(num_warps=2, elements=4)


def forward(
    table: jax.Array, index: jax.Array, weights: jax.Array, *, launch: Launch = FORWARD, interpret: bool = False
) -> jax.Array:
    """Weighted sums: table `[R, C]`, index int32 and weights float32 `[N, K]` -> `[N, C]` in the type of the table."""
    grid, tile = _grid(index, table.shape[1], launch)
    (out,) = pallas_call(
        functools.partial(_forward, tile=tile, rows=len(index), terms=index.shape[1]),
        out_shape=[((len(index), table.shape[1]), table.dtype)],
        grid=grid,
        launch=launch,
        interpret=interpret,
        name="weighted_rows_forward",
        flops=2 * index.size * table.shape[1],
    )(table, index, weights)
    return out


def backward(
    rows: int,
    index: jax.Array,
    weights: jax.Array,
    gradient: jax.Array,
    *,
    launch: Launch = BACKWARD,
    interpret: bool = False,
) -> jax.Array:
    """Gradient of the table, from the gradient of the output; it is summed in no particular order.

    Args:
      rows: number of rows of the table.
      index, weights: `[N, K]`.
      gradient: `[N, C]`.

    Returns:
      float32 `[rows, C]`.
    """
    channels = gradient.shape[1]
    grid, tile = _grid(index, channels, launch)
    zeros, gradient = zeros_after(gradient, (rows, channels))
    (out,) = pallas_call(
        functools.partial(_backward, tile=tile, rows=len(index), terms=index.shape[1]),
        out_shape=[(zeros.shape, zeros.dtype)],
        grid=grid,
        input_output_aliases={3: 0},
        launch=launch,
        interpret=interpret,
        name="weighted_rows_backward",
        flops=2 * index.size * channels,
    )(index, weights, gradient, zeros)
    return out


def _grid(index, channels, launch):
    """Numbers of programs along rows and along channels, and the tile (rows, channels) that each works on."""
    width = min(power_of_two(channels), TILE)
    block = launch.block(width)
    return (pl.cdiv(len(index), block), pl.cdiv(channels, width)), (block, width)


def _place(tile, rows, channels):
    """What this program works on: rows `[block]`, whether each exists, channels `[width]`, whether each pair exists."""
    row = pl.program_id(0) * tile[0] + jnp.arange(tile[0])
    channel = pl.program_id(1) * tile[1] + jnp.arange(tile[1])
    live = row < rows
    return row, live, channel, live[:, None] & (channel < channels)[None, :]


def _forward(table, index, weights, out, *, tile, rows, terms):
    row, live, channel, exists = _place(tile, rows, table.shape[1])

    def add(term, total):
        source = plt.load(index.at[row, term], mask=live, other=0)
        weight = plt.load(weights.at[row, term], mask=live, other=0.0)
        mask = (weight != 0)[:, None] & exists
        loaded = plt.load(table.at[source[:, None], channel[None, :]], mask=mask, other=0)
        return total + weight[:, None] * loaded.astype(jnp.float32)

    total = jax.lax.fori_loop(0, terms, add, jnp.zeros(tile, jnp.float32))
    plt.store(out.at[row[:, None], channel[None, :]], total.astype(out.dtype), mask=exists)


def _backward(index, weights, gradient, _, out, *, tile, rows, terms):
    row, live, channel, exists = _place(tile, rows, out.shape[1])
    gradient = plt.load(gradient.at[row[:, None], channel[None, :]], mask=exists, other=0).astype(jnp.float32)

    def add(term, _):
        target = plt.load(index.at[row, term], mask=live, other=0)
        weight = plt.load(weights.at[row, term], mask=live, other=0.0)
        mask = (weight != 0)[:, None] & exists
        relaxed_add(out, (target[:, None], channel[None, :]), weight[:, None] * gradient, mask)
        return 0

    jax.lax.fori_loop(0, terms, add, 0)
