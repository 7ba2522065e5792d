"""From a jaxpr to nodes: its operations one after the other, with the functions that it calls in place."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from hpr_jax.inference.onnx.graph import Graph, Value
from hpr_jax.inference.onnx.table import FUNCTIONS, TABLE, Equation, UntranslatableError

# Calls of a jaxpr, which stands in one of these parameters.
_CALLED = ("call_jaxpr", "fun_jaxpr", "jaxpr")
_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "remat2", "checkpoint")


def outputs_of(graph: Graph, closed: Any, inputs: Sequence[Value]) -> list[Value]:
    """The results of a jaxpr, closed or without constants, whose nodes are added to a graph.

    Raises:
      UntranslatableError: an operation has no translation.
    """
    jaxpr, constants = (closed.jaxpr, closed.consts) if isinstance(closed, core.ClosedJaxpr) else (closed, ())
    known = dict(zip(jaxpr.constvars, (Value.constant(constant) for constant in constants)))
    known.update(zip(jaxpr.invars, inputs))

    def read(atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            aval: Any = atom.aval
            return Value.constant(atom.val, aval.dtype)
        return known[atom]

    for equation in jaxpr.eqns:
        results = _results(graph, equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def _results(graph: Graph, equation: core.JaxprEqn, inputs: Sequence[Value]) -> Sequence[Value]:
    name = equation.primitive.name
    if name in _CALLS:
        whole = FUNCTIONS.get(equation.params.get("name", ""))
        if whole is not None:
            return whole(graph, Equation.of(equation), inputs)
        return outputs_of(graph, next(equation.params[one] for one in _CALLED if one in equation.params), inputs)
    if name not in TABLE:
        raise UntranslatableError(f"the operation {name} of JAX has no translation to ONNX")
    try:
        return TABLE[name](graph, Equation.of(equation), inputs)
    except UntranslatableError as error:
        # The innermost operation is named.
        text = str(error)
        raise UntranslatableError(
            text if text.startswith("the operation") else f"the operation {name} of JAX {text}"
        ) from error
