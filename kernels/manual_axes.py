"""What varies over the devices inside a `jax.shard_map`."""

import jax


def vary_alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """The arrays, each varying over all mesh axes that any of them varies over; None stays None.

    Kernels want arguments like that, and so do functions with gradients of their own, which vary as all the arguments do
    together: JAX sums those of an argument that was the same on all devices. Where `shard_map` does not check what varies,
    nothing happens.
    """
    axes = frozenset().union(*(_axes(array) for array in arrays if array is not None))
    return [array if array is None else _vary(array, axes - _axes(array)) for array in arrays]


def _axes(array):
    return jax.typeof(array).manual_axis_type.varying


def _vary(array, axes):
    return jax.lax.pcast(array, tuple(axes), to="varying") if axes else array
