"""Padding-invariant convolution, whose gradients are fast on CPUs, too."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.order import compute_after
from hpr_jax.ops.padding import zero_padding
from hpr_jax.ops.platform import target_platform


def convolution(x: jax.Array, kernel: jax.Array, stride: int, sizes: jax.Array) -> jax.Array:
    """Convolution of the valid areas, around which everything counts as zero, whatever the padding holds.

    Differentiable, on CPUs in reverse mode only.

    Args:
      x: `[B, h, w, in]`.
      kernel: `[k, k, in, out]` with an odd k; k // 2 zeros are added on each side of x.
      sizes: int32 `[B, 2]`, valid (height, width) of each map of x.

    Returns:
      `[B, ceil(h / stride), ceil(w / stride), out]` in the type of x. Outside the valid area, which is
      ceil(sizes / stride), are arbitrary finite values.
    """
    convolve: Callable[..., jax.Array] = _by_taps if target_platform() == "cpu" else _plain
    return convolve(*vary_alike(zero_padding(x, sizes), kernel), stride)


def _plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


# The same with a gradient of its own. XLA computes the gradient of the kernel as a convolution with a kernel as large as the
# map. On CPUs that takes two to three times as long as k * k matrix products over all pixels, one for each tap (place in the
# kernel). They are computed in a loop, so that only one shifted copy of the map exists at a time.
_by_taps = jax.custom_vjp(_plain, nondiff_argnums=(2,))


def _backward(stride, residuals, gradient):
    x, kernel = residuals
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    batch, height, width, _ = gradient.shape
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    window = (batch, (height - 1) * stride + 1, (width - 1) * stride + 1, x.shape[-1])

    def tap_gradient(tap):
        seen = jax.lax.dynamic_slice(padded, (0, tap // size, tap % size, 0), window)[:, ::stride, ::stride]
        return jnp.einsum("bhwi,bhwo->io", seen, gradient, preferred_element_type=kernel.dtype)

    (x_gradient,) = jax.linear_transpose(functools.partial(_plain, kernel=kernel, stride=stride), x)(gradient)
    kernel_gradient = jax.lax.map(tap_gradient, jnp.arange(size * size)).reshape(kernel.shape)
    return compute_after(kernel_gradient, x_gradient), kernel_gradient


_by_taps.defvjp(lambda x, kernel, stride: (_by_taps(x, kernel, stride), (x, kernel)), _backward)
