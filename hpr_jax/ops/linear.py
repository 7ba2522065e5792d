"""Linear layer with a gradient of its own."""

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.order import compute_after


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x @ kernel + bias` in the type of x: x `[..., in]`, kernel `[in, out]`, bias `[out]` or None -> `[..., out]`.

    Differentiable in reverse mode. The gradient is fast on CPUs, too: the sum over rows for the bias is a matrix product,
    and the kernel's gradient is ordered so that XLA transposes the narrower of its two factors.
    """
    return _affine(*vary_alike(x, kernel, bias))


@jax.custom_vjp
def _affine(x, kernel, bias):
    product = x @ kernel.astype(x.dtype)
    return product if bias is None else product + bias.astype(x.dtype)


def _affine_forward(x, kernel, bias):
    return _affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(residuals, gradient):
    x, kernel, bias = residuals
    inputs, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])

    def sum_over_rows(left, right):
        return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype)

    narrow = inputs.shape[1] <= outputs.shape[1]
    kernel_gradient = sum_over_rows(inputs, outputs) if narrow else sum_over_rows(outputs, inputs).T
    bias_gradient = None if bias is None else sum_over_rows(jnp.ones((len(outputs), 1), outputs.dtype), outputs)[0]
    x_gradient = gradient @ kernel.T.astype(gradient.dtype)
    return compute_after(kernel_gradient, x_gradient), kernel_gradient, bias_gradient


_affine.defvjp(_affine_forward, _affine_backward)
