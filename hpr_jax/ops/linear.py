"""Linear layers with a gradient of their own."""

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.order import after


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x @ kernel + bias` in the type of x `[..., in]`: kernel `[in, out]`, bias `[out]` or None -> `[..., out]`.

    Differentiable in reverse mode, in a way that is fast on CPUs, too: sums over rows are products, and of what the kernel's
    gradient multiplies, the narrower is the one that XLA has to turn.
    """
    return _affine(*vary_alike(x, kernel, bias))


@jax.custom_vjp
def _affine(x, kernel, bias):
    product = x @ kernel.astype(x.dtype)
    return product if bias is None else product + bias.astype(x.dtype)


def _affine_backward(residuals, gradient):
    x, kernel, bias = residuals
    inputs, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])

    def summed(left, right):
        return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype)

    narrow = inputs.shape[1] <= outputs.shape[1]
    of_kernel = summed(inputs, outputs) if narrow else summed(outputs, inputs).T
    of_bias = None if bias is None else summed(jnp.ones((len(outputs), 1), outputs.dtype), outputs)[0]
    return after(of_kernel, gradient @ kernel.T.astype(gradient.dtype)), of_kernel, of_bias
