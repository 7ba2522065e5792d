"""What TF32 does to products, emulated on a CPU."""

import jax
import jax.numpy as jnp

from hpr_jax.ops import convolution, linear


def rounded(x: jax.Array) -> jax.Array:
    """Float32 numbers with the 10 stored bits of TF32's mantissa, rounded to nearest; others stay as they are."""
    if x.dtype != jnp.float32:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + 0x1000) & jnp.uint32(0xFFFFE000), jnp.float32)


def emulate(monkeypatch, *, also_exact: bool = False) -> None:
    """From now on linear layers and convolutions that are traced round their factors, as GPUs do.

    Args:
      also_exact: those, too, that ask for float32.
    """
    affine, convolve = linear._affine, convolution._by_taps

    def rounds(precision):
        return also_exact or precision not in ("high", "highest")

    def rounded_affine(precision, x, kernel, bias):
        factors = (rounded(x), rounded(kernel)) if rounds(precision) else (x, kernel)
        return affine(precision, *factors, bias)

    def rounded_convolution(x, kernel, stride):
        factors = (rounded(x), rounded(kernel)) if rounds(linear.of_products()) else (x, kernel)
        return convolve(*factors, stride)

    monkeypatch.setattr(linear, "_affine", rounded_affine)
    monkeypatch.setattr(convolution, "_by_taps", rounded_convolution)
