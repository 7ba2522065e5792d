"""Where and in which order XLA computes a value, for where its own choice takes more memory or fails."""

import jax
import jax.numpy as jnp

from hpr_jax.ops.platform import target_platform


def compute_after(other: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x unchanged, but on CPUs makes XLA compute `other` first, by a false dependency.

    Left to itself, XLA computes last what no other value depends on, such as the gradients of weights, and until then holds
    in memory everything that they are made of. On CPUs it ignores optimisation barriers, but not a dependency on a number.
    If the first number of `other` is NaN, so is the result.
    """
    if target_platform() != "cpu":
        return x
    first = other.ravel()[0]
    return x + jnp.where(jnp.isnan(first), first, 0).astype(x.dtype)


def materialized(x: jax.Array) -> jax.Array:
    """Returns x unchanged, but keeps XLA from computing it anew inside the operations that read it.

    The operand of a product must not be a strided slice: when XLA's GPU compiler (seen in JAX 0.11.2) makes one Triton
    kernel of both, it ends the process at a failed check of its tiling.
    """
    return jax.lax.optimization_barrier(x)
