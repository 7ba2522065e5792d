"""Weighted sums of a table's rows, and their gradient, as XLA operations: the core of both kinds of sampling. Formed for
CPUs, so that what is gathered stays in the caches; the kernels for GPUs are in `kernels/`."""

from typing import Any

import jax
import jax.numpy as jnp

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


def zeros(shape: tuple[int, ...], *like: jax.Array) -> jax.Array:
    """float32 zeros for a loop to begin with, which vary over all mesh axes that these arrays vary over (in `shard_map`)."""
    return sum(jnp.zeros_like(array, jnp.float32, shape) for array in like)


def add_weighted_rows(total: jax.Array, index: jax.Array, weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """Adds to `total` `[S, D]` the table's gradient, given that of the result of `weighted_rows` `[N, D]`."""
    return total.at[index].add(weight[..., None] * gradient[:, None], mode="promise_in_bounds")


def in_chunks(size: int, length: int, tree: Any, *, mode: str = "constant") -> Any:
    """Arrays `[length, ...]` -> `[chunks, <= size, ...]`, for `jax.lax.scan`; filled up with zeros, or in another mode of
    `jnp.pad`."""
    chunks = -(-length // size)
    size = -(-length // chunks)

    def cut(array):
        padding = [(0, chunks * size - length)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding, mode=mode).reshape(chunks, size, *array.shape[1:])

    return jax.tree.map(cut, tree)


def out_of_chunks(length: int, tree: Any) -> Any:
    """Undoes `in_chunks`."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:length], tree)
