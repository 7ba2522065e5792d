"""Counts the floating-point operations of a traced function."""

import math
from collections.abc import Iterator
from typing import Any


def product_flops(jaxpr: Any) -> int:
    """Twice the multiply-adds of all matrix products and convolutions in a jaxpr and in the jaxprs inside it.

    The body of a scan counts as often as it runs. Of a conditional, the branch with the most operations counts. The body of
    a while loop counts once, since a jaxpr does not tell how often it runs; the detector's while loops have no products.
    """
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * (kernel.size // outputs)
    inner = [product_flops(jaxpr) for jaxpr in inner_jaxprs(equation)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters: of loops, branches, and functions that are called."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            # A closed jaxpr holds its jaxpr in an attribute.
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
