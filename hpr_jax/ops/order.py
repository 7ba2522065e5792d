"""The order in which a program computes, for where XLA's own order takes more memory."""

import jax
import jax.numpy as jnp


def compute_after(other: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x unchanged, but on CPUs makes XLA compute `other` first, by a false dependency.

    Left to itself, XLA computes last what no other value depends on, such as the gradients of weights, and until then holds
    in memory everything that they are made of. On CPUs it ignores optimisation barriers, but not a dependency on a number.
    If the first number of `other` is NaN, so is the result.
    """
    if jax.default_backend() != "cpu":
        return x
    first = other.ravel()[0]
    return x + jnp.where(jnp.isnan(first), first, 0).astype(x.dtype)
