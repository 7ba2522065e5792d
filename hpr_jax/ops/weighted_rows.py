"""Weighted sums of a table's rows, and the gradient of the table: the core of deformable sampling and of RoIAlign.

These are XLA operations, arranged so that what they gather fits a CPU's cache; the kernels for GPUs are in `kernels/`.
"""

import jax
import jax.numpy as jnp

from hpr_jax.ops.chunks import zeros
from hpr_jax.ops.platform import target_platform

# Number of rows that are gathered and summed at a time: the four corners around a sampling point. XLA fuses their gathers
# with the sum; with more rows its loops are slower.
CORNERS = 4


def weighted_rows(table: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted sums of rows: `out[n] = sum_k weight[n, k] * table[index[n, k]]`.

    Args:
      table: `[S, D]`.
      index: int32 `[N, K]`, all within the table; K is a multiple of 4.
      weight: float32 `[N, K]`.

    Returns:
      float32 `[N, D]`.
    """
    # Converted in front of the gather: there are fewer rows in the table than are gathered.
    table = table.astype(jnp.float32)
    if target_platform() == "onnx":
        # Nothing is fused there, and every operation in a loop costs time of its own.
        return jnp.einsum("nk,nkd->nd", weight, table.at[index].get(mode="promise_in_bounds"))

    def by_step(array):
        return array.T.reshape(-1, CORNERS, array.shape[0])

    def step(total, rows):
        index, weight = rows
        for k in range(CORNERS):
            total += weight[k, :, None] * table.at[index[k]].get(mode="promise_in_bounds")
        return total, None

    nothing = zeros((index.shape[0], table.shape[1]), table, weight)
    return jax.lax.scan(step, nothing, (by_step(index), by_step(weight)))[0]


def add_weighted_rows(total: jax.Array, index: jax.Array, weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """Adds the gradient of the table of `weighted_rows` to a running total.

    Args:
      total: `[S, D]`.
      index, weight: `[N, K]`, the arguments of `weighted_rows`.
      gradient: of the result of `weighted_rows`, `[N, D]`.

    Returns:
      `[S, D]`.
    """
    return total.at[index].add(weight[..., None] * gradient[:, None], mode="promise_in_bounds")
