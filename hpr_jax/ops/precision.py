"""The precision of products of float32 numbers: matrix products and convolutions.

NVIDIA GPUs compute them in TF32 unless they are told not to: factors are rounded to 11 significant bits, a relative error of
up to 5e-4 each, and sums stay float32. Such products are seven times as fast as exact ones. CPUs are exact in any case, and
products of bfloat16 numbers have float32 sums.

What selects by rank or says where boxes are must be exact: logits of near ties would change places, and a relative error of
5e-4 in the offset of a box is a pixel in a large image. So heads are always `exact`, and for the rest detectors have a
setting.
"""

import contextlib
from typing import Any, cast

import jax


def products(precision: str | None) -> contextlib.AbstractContextManager[None]:
    """A context in which products that are traced have a precision.

    Args:
      precision: `default` or None, what JAX does, on NVIDIA GPUs TF32, unless JAX itself is told otherwise; `high`, several
        products of rounded numbers in place of one; `highest`, float32; or what `of_products` has returned.
    """
    return contextlib.nullcontext() if precision in (None, "default") else jax.default_matmul_precision(precision)


def exact() -> contextlib.AbstractContextManager[None]:
    """A context in which products that are traced are products of float32 numbers on every machine."""
    return products("highest")


def of_products() -> str | None:
    """The precision of products that are traced now; None: the default one.

    JAX's own gradients have the precision of the product that they are of. Those of this project are traced later, outside
    of the context in which the product was, and are given it by this.
    """
    # The setting is documented, and JAX's types do not know it.
    return cast(Any, jax.config).jax_default_matmul_precision
