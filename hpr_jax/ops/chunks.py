"""Cuts long arrays into chunks for loops, so that what is computed of a chunk fits the cache, or takes less memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from hpr_jax.ops.platform import target_platform


def by_chunks(function: Callable[[Any], jax.Array], size: int, rows: Any) -> jax.Array:
    """Returns `function(rows)`, but on CPUs computes it for at most `size` rows at a time, and again in the backward pass.

    Args:
      function: arrays `[n, ...]` -> array `[n, ...]`, each row of which depends on the same row of the arrays alone.
      rows: arrays `[N, ...]`.

    Returns:
      `[N, ...]`.
    """
    length = jax.tree.leaves(rows)[0].shape[0]
    # GPUs are faster with all rows at once.
    if target_platform() != "cpu" or (not is_symbolic_dim(length) and length <= size):
        return function(rows)
    return out_of_chunks(length, jax.lax.map(jax.checkpoint(function), in_chunks(size, length, rows)))


def in_chunks(size: int, length: int, tree: Any, *, mode: str = "constant") -> Any:
    """Cuts arrays `[length, ...]` into equal chunks of at most `size` rows: `[chunks, rows, ...]`, for `jax.lax.scan`. Where
    the length is a symbol, as in programs for any batch, chunks have `size` rows.

    The last chunk is filled up with zeros, or as another `mode` of `jnp.pad` does.
    """
    chunks = -(-length // size)
    if not is_symbolic_dim(length):
        size = -(-length // chunks)

    def cut(array):
        padding = [(0, chunks * size - length)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding, mode=mode).reshape(chunks, size, *array.shape[1:])

    return jax.tree.map(cut, tree)


def out_of_chunks(length: int, tree: Any) -> Any:
    """The inverse of `in_chunks`."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:length], tree)


def zeros(shape: tuple[int, ...], *like: jax.Array) -> jax.Array:
    """float32 zeros for a loop to start from. In `shard_map` they vary over all mesh axes that arrays `like` vary over."""
    return functools.reduce(jnp.add, [jnp.zeros_like(array, jnp.float32, shape) for array in like])
