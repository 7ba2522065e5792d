"""The matrix products and convolutions of a program."""

from collections.abc import Iterator
from typing import Any


def products(jaxpr: Any) -> Iterator[Any]:
    """The equations of all matrix products and convolutions, also inside of loops and calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                item = getattr(item, "jaxpr", item)
                if hasattr(item, "eqns"):
                    yield from products(item)
