"""Long arrays cut into chunks for loops, so that what is computed of a chunk stays in the caches, or needs less memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def by_chunks(function: Callable[[Any], jax.Array], size: int, rows: Any) -> jax.Array:
    """`function(rows)`, for a function of each row alone: on CPUs so many rows at a time, for the backward pass again.

    Args:
      function: arrays `[n, ...]` -> `[n, ...]`.
      rows: arrays `[N, ...]`.
    """
    length = len(jax.tree.leaves(rows)[0])
    # GPUs are faster with the whole.
    if jax.default_backend() != "cpu" or length <= size:
        return function(rows)
    return out_of_chunks(length, jax.lax.map(jax.checkpoint(function), in_chunks(size, length, rows)))


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


def zeros(shape: tuple[int, ...], *like: jax.Array) -> jax.Array:
    """float32 zeros for a loop to begin with, which vary over all mesh axes that these arrays vary over (in `shard_map`)."""
    return sum(jnp.zeros_like(array, jnp.float32, shape) for array in like)
