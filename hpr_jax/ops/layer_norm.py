"""Layer normalisation with a gradient of its own."""

import functools

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.order import after


def normalized(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """x `[..., C]` over C with mean 0 and variance 1, times scale `[C]`, plus bias `[C]`: float32 inside, in the type of x.

    Differentiable in reverse mode, with one pass over x for the sums over its rows and one for its own gradient: XLA would
    join the two, and on CPUs write down several arrays as large as x.
    """
    return _normalized(*vary_alike(x, scale, bias), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalized(x, scale, bias, epsilon):
    return _normalized_forward(x, scale, bias, epsilon)[0]


def _normalized_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.float32)
    center = jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide - center), axis=-1, keepdims=True) + epsilon)
    return ((wide - center) * (inverse * scale) + bias).astype(x.dtype), (x, center, inverse, scale)


def _normalized_backward(epsilon, residuals, gradient):
    x, center, inverse, scale = residuals
    x, gradient, rows = x.astype(jnp.float32), gradient.astype(jnp.float32), tuple(range(x.ndim - 1))
    of_scale = jnp.sum(gradient * ((x - center) * inverse), axis=rows)
    of_bias = jnp.sum(gradient, axis=rows)
    center, inverse = after(of_scale, center), after(of_scale, inverse)
    unit, scaled = (x - center) * inverse, gradient * scale

    def mean(array):
        return jnp.mean(array, axis=-1, keepdims=True)

    of_x = inverse * (scaled - mean(scaled) - unit * mean(unit * scaled))
    return of_x.astype(residuals[0].dtype), of_scale, of_bias
