"""Convolution whose gradients are fast on CPUs, too."""

import functools

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.order import after


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`[B, h, w, in]`, zero-padded by k // 2, with a kernel `[k, k, in, out]` (k odd) -> `[B, ceil(h / stride),
    ceil(w / stride), out]`, in the type of x. On CPUs differentiable in reverse mode."""
    return (_by_taps if jax.default_backend() == "cpu" else _plain)(*vary_alike(x, kernel), stride)


def _plain(x, kernel, stride):
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


# XLA's gradient of the kernel is a convolution with a kernel as large as the map. On CPUs that takes two to three times as
# long as products over all pixels, one for each of the k x k taps; in a loop, so that one shifted copy of the map lives at a
# time.
_by_taps = jax.custom_vjp(_plain, nondiff_argnums=(2,))


def _backward(stride, residuals, gradient):
    x, kernel = residuals
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    batch, height, width, _ = gradient.shape
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    window = (batch, (height - 1) * stride + 1, (width - 1) * stride + 1, x.shape[-1])

    def of_tap(tap):
        seen = jax.lax.dynamic_slice(padded, (0, tap // size, tap % size, 0), window)[:, ::stride, ::stride]
        return jnp.einsum("bhwi,bhwo->io", seen, gradient, preferred_element_type=kernel.dtype)

    (of_x,) = jax.linear_transpose(functools.partial(_plain, kernel=kernel, stride=stride), x)(gradient)
    of_kernel = jax.lax.map(of_tap, jnp.arange(size * size)).reshape(kernel.shape)
    return after(of_kernel, of_x), of_kernel


_by_taps.defvjp(lambda x, kernel, stride: (_by_taps(x, kernel, stride), (x, kernel)), _backward)
