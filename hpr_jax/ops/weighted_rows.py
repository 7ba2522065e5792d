"""Weighted sums of a table's rows, and their gradient, as XLA operations: the core of both kinds of sampling. Formed for
CPUs, so that what is gathered stays in the caches; the kernels for GPUs are in `kernels/`."""

import jax
import jax.numpy as jnp

from hpr_jax.ops.chunks import zeros

# XLA fuses the gathers of so many rows, the corners around a sample, with their sum; with more its loops are slower again.
CORNERS = 4


def weighted_rows(table: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    """`out[n] = sum_k weight[n, k] * table[index[n, k]]`.

    Args:
      table: `[S, D]`; index: int32 `[N, K]`, within the table; weight: float32 `[N, K]`; K is a multiple of 4.

    Returns:
      float32 `[N, D]`.
    """
    # Widened before the gather: once for each row of the table, which is shorter.
    table = table.astype(jnp.float32)

    def by_step(array):
        return array.T.reshape(-1, CORNERS, len(array))

    def step(total, rows):
        index, weight = rows
        for k in range(CORNERS):
            total += weight[k, :, None] * table.at[index[k]].get(mode="promise_in_bounds")
        return total, None

    nothing = zeros((len(index), table.shape[1]), table, weight)
    return jax.lax.scan(step, nothing, (by_step(index), by_step(weight)))[0]


def add_weighted_rows(total: jax.Array, index: jax.Array, weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """Adds to `total` `[S, D]` the table's gradient, given that of the result of `weighted_rows` `[N, D]`."""
    return total.at[index].add(weight[..., None] * gradient[:, None], mode="promise_in_bounds")
