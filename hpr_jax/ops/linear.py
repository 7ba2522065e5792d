"""Linear layer with a gradient of its own."""

import functools

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.order import compute_after
from hpr_jax.ops.precision import of_products, products


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x @ kernel + bias` in the type of x: x `[..., in]`, kernel `[in, out]`, bias `[out]` or None -> `[..., out]`.

    Differentiable in reverse mode. The gradient is fast on CPUs, too: the kernel's is ordered so that XLA transposes the
    narrower of its two factors, and for the bias's see `sum_rows`.
    """
    return _affine(of_products(), *vary_alike(x, kernel, bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(precision, x, kernel, bias):
    with products(precision):
        product = x @ kernel.astype(x.dtype)
    return product if bias is None else product + bias.astype(x.dtype)


def _affine_forward(precision, x, kernel, bias):
    return _affine(precision, x, kernel, bias), (x, kernel, bias)


def _affine_backward(precision, residuals, gradient):
    x, kernel, bias = residuals
    inputs, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])

    def sum_over_rows(left, right):
        return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=kernel.dtype)

    narrow = inputs.shape[1] <= outputs.shape[1]
    with products(precision):
        kernel_gradient = sum_over_rows(inputs, outputs) if narrow else sum_over_rows(outputs, inputs).T
        x_gradient = gradient @ kernel.T.astype(gradient.dtype)
    bias_gradient = None if bias is None else sum_rows(outputs, kernel.dtype)
    return compute_after(kernel_gradient, x_gradient), kernel_gradient, bias_gradient


def sum_rows(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The sum of all rows, in a type of at least the precision of theirs: `[N, C]` -> `[C]`.

    XLA's sums over the first axis are slow on CPUs, where a product with ones takes their place. On GPUs XLA would write a
    converted copy of x for that product, which its sum does without.
    """

    def product(x):
        ones = jnp.ones((len(x), 1), x.dtype)
        return jax.lax.dot_general(ones, x, (((0,), (0,)), ((), ())), preferred_element_type=dtype)[0]

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: jnp.sum(x, axis=0, dtype=dtype))


_affine.defvjp(_affine_forward, _affine_backward)
