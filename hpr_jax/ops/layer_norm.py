"""Layer normalisation with a gradient of its own."""

import functools

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.order import compute_after


def normalized(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation: x `[..., C]` with mean 0 and variance 1 over C, times scale `[C]`, plus bias `[C]`.

    It computes in float32, and the result `[..., C]` has the type of x. Differentiable in reverse mode. The backward pass
    reads x once for the gradients of scale and bias and once for its own gradient: XLA would fuse the two, and on CPUs store
    several arrays as large as x.
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
    scale_gradient = jnp.sum(gradient * ((x - center) * inverse), axis=rows)
    bias_gradient = jnp.sum(gradient, axis=rows)
    center, inverse = compute_after(scale_gradient, center), compute_after(scale_gradient, inverse)
    unit, scaled = (x - center) * inverse, gradient * scale

    def mean(array):
        return jnp.mean(array, axis=-1, keepdims=True)

    x_gradient = inverse * (scaled - mean(scaled) - unit * mean(unit * scaled))
    return x_gradient.astype(residuals[0].dtype), scale_gradient, bias_gradient


_normalized.defvjp(_normalized_forward, _normalized_backward)
