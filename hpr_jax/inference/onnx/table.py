"""The table of JAX's primitives, and how each becomes nodes of ONNX."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from hpr_jax.inference.onnx.graph import Graph, Value


@dataclasses.dataclass(frozen=True)
class Equation:
    """One operation of a jaxpr.

    Attributes:
      name: of its primitive.
      params: of its primitive.
      shapes, dtypes: of its arguments.
      out_shapes, out_dtypes: of its results.
    """

    name: str
    params: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    out_shapes: tuple[tuple[int, ...], ...]
    out_dtypes: tuple[Any, ...]

    @classmethod
    def of(cls, equation: core.JaxprEqn) -> "Equation":
        # Abstract values have no common class with a shape and a type.
        avals: list[list[Any]] = [[atom.aval for atom in atoms] for atoms in (equation.invars, equation.outvars)]
        arguments, results = avals
        return cls(
            equation.primitive.name,
            equation.params,
            tuple(aval.shape for aval in arguments),
            tuple(aval.dtype for aval in arguments),
            tuple(aval.shape for aval in results),
            tuple(aval.dtype for aval in results),
        )


# Takes the graph, the equation and its arguments, and returns its results.
Translation = Callable[[Graph, Equation, Sequence[Value]], Sequence[Value]]

TABLE: dict[str, Translation] = {}
# Of jitted functions, by their names: what ONNX has as one operation.
FUNCTIONS: dict[str, Translation] = {}


def translates(*names: str) -> Callable[[Translation], Translation]:
    """Enters a function into the table under the names of some primitives."""

    def enter(function: Translation) -> Translation:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return enter


class UntranslatableError(Exception):
    """An operation has no translation; its text says which one and what about it, as a clause."""
