"""The order in which a program computes, where XLA's own takes more memory."""

import jax
import jax.numpy as jnp


def after(other: jax.Array, x: jax.Array) -> jax.Array:
    """x, on CPUs not before `other`; NaN if the first number of that is.

    XLA computes what nothing waits for, like the gradients of weights, last of all, and until then keeps what it is made of.
    Its programs for CPUs know no barriers, but they keep to what depends on numbers.
    """
    if jax.default_backend() != "cpu":
        return x
    first = other.ravel()[0]
    return x + jnp.where(jnp.isnan(first), first, 0).astype(x.dtype)
