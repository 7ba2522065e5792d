"""Loops and choices, whose bodies are jaxprs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpr_jax.inference.onnx.elementwise import where
from hpr_jax.inference.onnx.graph import Graph, Value
from hpr_jax.inference.onnx.shapes import stacked, taken
from hpr_jax.inference.onnx.table import Equation, UntranslatableError, translates
from hpr_jax.inference.onnx.translate import outputs_of


@translates("scan")
def _scan(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    params, body = equation.params, equation.params["jaxpr"]
    consts, carried = params["num_consts"], params["num_carry"]
    constants, carry, rows = inputs[:consts], list(inputs[consts : consts + carried]), inputs[consts + carried :]
    row_shapes = equation.shapes[consts + carried :]
    # A loop over weights is one over layers. Layer after layer, each finds its weights as constants, and ONNX Runtime
    # arranges those in advance.
    if params["length"] == 1 or any(row.label for row in rows):
        return _unrolled(graph, equation, constants, carry, rows, row_shapes)
    whole = [graph.whole(*pair) for pair in zip(inputs[consts:], equation.shapes[consts:])]
    if not rows:
        # The number of rounds is that of rows.
        whole.append(Value.constant(np.zeros(params["length"]), bool))
    graph.begin_body()
    state = [graph.input(graph.unique("state"), value.shape, value.dtype) for value in whole[:carried]]
    read = [graph.input(graph.unique("row"), value.shape[1:], value.dtype) for value in whole[carried:]]
    found = outputs_of(graph, body, [*constants, *state, *read[: len(rows)]])
    results = [graph.whole(value, aval.shape) for value, aval in zip(found, body.out_avals)]
    bodies = {"body": graph.end_body([*state, *read], results)}
    backwards, count = int(params["reverse"]), len(results)
    directions = {"scan_input_directions": [backwards] * len(read)}
    if count > carried:
        directions["scan_output_directions"] = [backwards] * (count - carried)
    names = graph.with_bodies("Scan", whole, count, bodies, num_scan_inputs=len(read), **directions)
    return _values(names, equation.out_shapes, equation.out_dtypes)


def _unrolled(
    graph: Graph,
    equation: Equation,
    constants: Sequence[Value],
    carry: list[Value],
    rows: Sequence[Value],
    row_shapes: Sequence[tuple[int, ...]],
) -> list[Value]:
    """The results of a loop `jax.lax.scan` whose rounds stand one behind the other."""
    params, body = equation.params, equation.params["jaxpr"]
    length, kept = params["length"], []
    for place in reversed(range(length)) if params["reverse"] else range(length):
        now = [taken(graph, row, shape, 0, place) for row, shape in zip(rows, row_shapes)]
        named = [
            Value(value.shape, value.dtype, value.name, value.array, f"{row.label}[{place}]" if row.label else "")
            for value, row in zip(now, rows)
        ]
        found = outputs_of(graph, body, [*constants, *carry, *named])
        carry = found[: len(carry)]
        kept.append(
            [graph.whole(*pair) for pair in zip(found[len(carry) :], [a.shape for a in body.out_avals[len(carry) :]])]
        )
    if params["reverse"]:
        kept.reverse()
    return [*carry, *(stacked(graph, values, 0) for values in zip(*kept))]


@translates("while")
def _while(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    params = equation.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    for_condition, for_body = inputs[:first], inputs[first : first + second]
    carried = [graph.whole(*pair) for pair in zip(inputs[first + second :], equation.out_shapes)]
    # Of several loops at once, as `jax.vmap` makes them, each has an answer of its own: whether it goes on.
    answers = params["cond_jaxpr"].out_avals[0].shape

    def goes_on(values: Sequence[Value]) -> Value:
        (answer,) = outputs_of(graph, params["cond_jaxpr"], [*for_condition, *values])
        return graph.whole(answer, answers)

    begin = _any(graph, goes_on(carried))
    graph.begin_body()
    rounds = graph.input(graph.unique("round"), (), np.int64)
    condition = graph.input(graph.unique("condition"), (), bool)
    state = [graph.input(graph.unique("state"), value.shape, value.dtype) for value in carried]
    found = outputs_of(graph, params["body_jaxpr"], [*for_body, *state])
    if answers:
        # Those that have ended stay as they are.
        moving = goes_on(state)
        found = [_where(graph, moving, *pair) for pair in zip(found, state)]
    found = [graph.whole(*pair) for pair in zip(found, equation.out_shapes)]
    bodies = {"body": graph.end_body([rounds, condition, *state], [_any(graph, goes_on(found)), *found])}
    names = graph.with_bodies("Loop", [None, begin, *carried], len(carried), bodies)
    return _values(names, equation.out_shapes, equation.out_dtypes)


def _any(graph: Graph, answers: Value) -> Value:
    """Whether one of some truth values is true."""
    if not answers.shape:
        return answers
    return graph.cast(graph.node("ReduceMax", [graph.cast(answers, np.int32)], (), np.int32, keepdims=0), bool)


def _where(graph: Graph, which: Value, chosen: Value, otherwise: Value) -> Value:
    """Rows of one array or of another, as truth values along the first axes say."""
    which = graph.reshape(which, [*which.shape, *[1] * (len(otherwise.shape) - len(which.shape))])
    return where(graph, which, chosen, otherwise)


@translates("cond")
def _cond(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    which, *operands = inputs
    branches = equation.params["branches"]
    if which.array is not None:
        return outputs_of(graph, branches[int(np.clip(which.array, 0, len(branches) - 1))], operands)
    if len(branches) != 2:
        raise UntranslatableError("chooses among more than two branches")
    bodies = {}
    for name, branch in zip(("else_branch", "then_branch"), branches):
        graph.begin_body()
        found = outputs_of(graph, branch, operands)
        whole = [graph.whole(*pair) for pair in zip(found, equation.out_shapes)]
        bodies[name] = graph.end_body([], whole)
    names = graph.with_bodies("If", [graph.cast(which, bool)], len(equation.out_shapes), bodies)
    return _values(names, equation.out_shapes, equation.out_dtypes)


@translates("platform_index")
def _platform(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    # What is meant for no platform in particular suits ONNX.
    platforms = list(equation.params["platforms"])
    if None not in platforms:
        raise UntranslatableError(f"is for {platforms} alone")
    return [Value.constant(platforms.index(None), np.int32)]


def _values(names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]) -> list[Value]:
    return [Value(shape, np.dtype(dtype), name) for name, shape, dtype in zip(names, shapes, dtypes)]
