"""Mesh axes that arrays vary over inside a `jax.shard_map`."""

from typing import TypeVar

import jax

T = TypeVar("T", jax.Array, jax.Array | None)


def vary_alike(*arrays: T) -> list[T]:
    """Makes each array vary over all mesh axes that any of the arrays varies over; None stays None.

    Kernels require such arguments. So do functions with gradients of their own, whose gradients vary over all axes that any
    argument varies over. For an argument that did not vary over an axis, JAX then sums the gradient over that axis. Where
    `shard_map` does not check what varies, nothing happens.
    """
    axes = frozenset().union(*(_axes(array) for array in arrays if array is not None))
    return [array if array is None else _vary(array, axes - _axes(array)) for array in arrays]


def _axes(array):
    return jax.typeof(array).manual_axis_type.varying


def _vary(array, axes):
    return jax.lax.pcast(array, tuple(axes), to="varying") if axes else array
