"""What varies over the devices inside a `jax.shard_map`."""

import jax


def vary_alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """The arrays, each varying over all mesh axes that any of them varies over; None stays None.

    For functions with gradients of their own, which vary as all the arguments do together: JAX sums those of an argument
    that was the same on all devices. Where `shard_map` does not check what varies, nothing happens.
    """
    varying = [None if array is None else jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*(kind for kind in varying if kind is not None))

    def vary(array, kind):
        missing = frozenset() if kind is None else axes - kind
        return jax.lax.pcast(array, tuple(missing), to="varying") if missing else array

    return [vary(array, kind) for array, kind in zip(arrays, varying)]
