"""Weighted sums of table rows, `out[n] = sum_k weights[n, k] * table[index[n, k]]`, and the gradient of the table.

XLA's form writes the gathered rows to memory and reads them again; the kernel keeps them in registers. Arithmetic is float32
whatever the type of the table. Additions of weight zero are left out.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hpr_jax.kernels.launch import Launch, pallas_call, power_of_two
from hpr_jax.kernels.relaxed_add import relaxed_add

# Channels of one program; wider tables take several.
TILE = 256
# Eight channels a thread: loads of 16 bytes, the widest there are.
FORWARD = Launch(num_warps=2, elements=8)
# Four: additions of 16 bytes, the widest there are.
BACKWARD = Launch(num_warps=2, elements=4)


def forward(
    table: jax.Array, index: jax.Array, weights: jax.Array, *, launch: Launch = FORWARD, interpret: bool = False
) -> jax.Array:
    """Table `[R, C]`, index int32 and weights float32 `[N, K]` -> `[N, C]` in the type of the table."""
    out, grid, tile = (len(index), table.shape[1]), *_grid(index, table.shape[1], launch)
    (out,) = pallas_call(
        functools.partial(_forward, tile=tile, rows=len(index), terms=index.shape[1]),
        out_shape=[(out, table.dtype)],
        grid=grid,
        launch=launch,
        interpret=interpret,
        name="weighted_rows_forward",
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
    """Gradient of the table, float32 `[rows, C]`, from that of the output, `[N, C]`; summed in no particular order."""
    channels = gradient.shape[1]
    grid, tile = _grid(index, channels, launch)
    zeros = jnp.zeros((rows, channels), jnp.float32)
    (out,) = pallas_call(
        functools.partial(_backward, tile=tile, rows=len(index), terms=index.shape[1]),
        out_shape=[(zeros.shape, zeros.dtype)],
        grid=grid,
        input_output_aliases={3: 0},
        launch=launch,
        interpret=interpret,
        name="weighted_rows_backward",
    )(index, weights, gradient, zeros)
    return out


def _grid(index, channels, launch):
    """Programs over rows and over channels, and the (rows, channels) of each."""
    width = min(power_of_two(channels), TILE)
    block = launch.block(width)
    return (pl.cdiv(len(index), block), pl.cdiv(channels, width)), (block, width)


def _place(tile, rows, channels):
    """This program's rows `[block]`, which of them exist, channels `[width]`, and which pairs exist."""
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
