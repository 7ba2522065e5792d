"""Operations on each number by itself."""

from collections.abc import Sequence

import numpy as np

from hpr_jax.inference.onnx.graph import Graph, Value
from hpr_jax.inference.onnx.table import Equation, UntranslatableError, translates

# The primitives that ONNX has, too.
_SAME = {
    "abs": "Abs",
    "add": "Add",
    "ceil": "Ceil",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tan": "Tan",
    "tanh": "Tanh",
}
_LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}
_IDENTITIES = (
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "pvary",
    "sharding_constraint",
    "stop_gradient",
)


@translates(*_SAME)
def _same(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [graph.elementwise(_SAME[equation.name], inputs, equation.out_dtypes[0])]


@translates(*_IDENTITIES)
def _identity(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return inputs


@translates(*_LOGICAL, "not")
def _logical(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    prefix = "" if equation.out_dtypes[0].kind == "b" else "Bitwise"
    return [graph.elementwise(prefix + {**_LOGICAL, "not": "Not"}[equation.name], inputs, equation.out_dtypes[0])]


@translates("ne")
def _differs(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [graph.elementwise("Not", [graph.elementwise("Equal", inputs, bool)], bool)]


@translates("square")
def _square(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [graph.elementwise("Mul", [inputs[0], inputs[0]], inputs[0].dtype)]


@translates("integer_pow")
def _integer_power(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    power = Value.constant(equation.params["y"], inputs[0].dtype)
    return [graph.elementwise("Pow", [inputs[0], power], inputs[0].dtype)]


@translates("exp2")
def _power_of_two(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [graph.elementwise("Pow", [Value.constant(2, inputs[0].dtype), inputs[0]], inputs[0].dtype)]


@translates("rsqrt")
def _inverse_root(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [graph.elementwise("Reciprocal", [graph.elementwise("Sqrt", inputs, inputs[0].dtype)], inputs[0].dtype)]


@translates("log1p")
def _log_one_plus(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    one = Value.constant(1, inputs[0].dtype)
    return [graph.elementwise("Log", [graph.elementwise("Add", [one, inputs[0]], one.dtype)], one.dtype)]


@translates("expm1")
def _exp_minus_one(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    one = Value.constant(1, inputs[0].dtype)
    return [graph.elementwise("Sub", [graph.elementwise("Exp", inputs, one.dtype), one], one.dtype)]


@translates("erfc")
def _complementary_error(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    one = Value.constant(1, inputs[0].dtype)
    return [graph.elementwise("Sub", [one, graph.elementwise("Erf", inputs, one.dtype)], one.dtype)]


@translates("is_finite")
def _is_finite(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    strange = [graph.elementwise(operator, inputs, bool) for operator in ("IsInf", "IsNaN")]
    return [graph.elementwise("Not", [graph.elementwise("Or", strange, bool)], bool)]


@translates("round")
def _round(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    # ONNX has JAX's second method alone.
    if int(equation.params["rounding_method"]) != 1:
        raise UntranslatableError("rounds halves away from zero")
    return [graph.elementwise("Round", inputs, inputs[0].dtype)]


@translates("clamp")
def _clamp(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    low, value, high = inputs
    return [graph.elementwise("Min", [graph.elementwise("Max", [low, value], value.dtype), high], value.dtype)]


@translates("rem")
def _remainder(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    # The remainder has the sign of the dividend.
    return [graph.elementwise("Mod", inputs, inputs[0].dtype, fmod=1)]


@translates("shift_right_arithmetic")
def _shift_right(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    value, places = inputs
    if places.array is None:
        raise UntranslatableError("shifts by a computed number of places")
    # ONNX shifts numbers without a sign alone. `Mod` has the sign of the divisor here, so that negative numbers, too, are
    # rounded downwards.
    divisor = Value.constant(np.left_shift(1, places.array), value.dtype)
    rest = graph.elementwise("Mod", [value, divisor], value.dtype)
    return [graph.elementwise("Div", [graph.elementwise("Sub", [value, rest], value.dtype), divisor], value.dtype)]


@translates("convert_element_type")
def _convert(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [graph.cast(inputs[0], equation.out_dtypes[0])]


@translates("select_n")
def _select(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    which, *cases = inputs
    if len(cases) == 1:
        return cases
    if which.dtype.kind != "b" or len(cases) > 2:
        raise UntranslatableError("chooses among more than two arrays")
    return [where(graph, which, cases[1], cases[0])]


def where(graph: Graph, which: Value, chosen: Value, otherwise: Value) -> Value:
    """Numbers of one array where a truth value is true, else of another."""
    if chosen.dtype.kind != "b":
        return graph.elementwise("Where", [which, chosen, otherwise], chosen.dtype)
    # ONNX Runtime has no `Where` for truth values.
    first = graph.elementwise("And", [which, chosen], bool)
    second = graph.elementwise("And", [graph.elementwise("Not", [which], bool), otherwise], bool)
    return graph.elementwise("Or", [first, second], bool)
