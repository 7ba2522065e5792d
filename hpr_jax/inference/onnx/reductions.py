"""Operations along axes: sums, extremes, sorting."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpr_jax.inference.onnx.graph import Graph, Value, integers
from hpr_jax.inference.onnx.table import Equation, UntranslatableError, translates

_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd"}


@translates(*_REDUCTIONS)
def _reduce(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [_reduced(graph, _REDUCTIONS[equation.name], equation, inputs[0], equation.out_dtypes[0])]


@translates("reduce_or", "reduce_and")
def _any_or_all(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    if equation.dtypes[0].kind != "b":
        raise UntranslatableError("reduces bits")
    # ONNX Runtime has no extremes of truth values.
    operator = "ReduceMax" if equation.name == "reduce_or" else "ReduceMin"
    numbers = _reduced(graph, operator, equation, graph.cast(inputs[0], np.int32), np.int32)
    return [graph.cast(numbers, bool)]


def _reduced(graph: Graph, operator: str, equation: Equation, value: Value, dtype: Any) -> Value:
    axes = equation.params["axes"]
    if not axes:
        return value
    whole = graph.whole(value, equation.shapes[0])
    return graph.node(operator, [whole, integers(axes)], equation.out_shapes[0], dtype, keepdims=0)


@translates("argmax", "argmin")
def _place_of_extreme(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    (axis,) = equation.params["axes"]
    whole = graph.whole(inputs[0], equation.shapes[0])
    numbers = graph.cast(whole, np.int32) if whole.dtype.kind == "b" else whole
    operator = "ArgMax" if equation.name == "argmax" else "ArgMin"
    # Of equals, both take the first.
    place = graph.node(operator, [numbers], equation.out_shapes[0], np.int64, axis=int(axis), keepdims=0)
    return [graph.cast(place, equation.out_dtypes[0])]


@translates("cumsum")
def _running_sum(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    axis = Value.constant(equation.params["axis"], np.int64)
    whole = graph.whole(inputs[0], equation.shapes[0])
    return [graph.node("CumSum", [whole, axis], whole.shape, whole.dtype, reverse=int(equation.params["reverse"]))]


@translates("top_k")
def _largest(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    axis = equation.params.get("axis", len(equation.shapes[0]) - 1)
    values, places = _sorted(graph, graph.whole(inputs[0], equation.shapes[0]), axis, equation.params["k"], largest=True)
    return [values, graph.cast(places, equation.out_dtypes[1])]


@translates("sort")
def _sort(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    if equation.params["num_keys"] != 1:
        raise UntranslatableError("sorts by several keys")
    axis, shape = equation.params["dimension"], equation.shapes[0]
    keys, *others = (graph.whole(value, shape) for value in inputs)
    keys, places = _sorted(graph, keys, axis, shape[axis], largest=False)
    return [keys, *(graph.node("GatherElements", [one, places], shape, one.dtype, axis=int(axis)) for one in others)]


def _sorted(graph: Graph, value: Value, axis: int, count: int, *, largest: bool) -> tuple[Value, Value]:
    """The first `count` numbers along an axis in falling or rising order, and their places; of equals, the one of the lower
    place comes first, in JAX as in ONNX."""
    size = Value.constant([count], np.int64)
    names = graph.nodes("TopK", [value, size], 2, axis=int(axis), largest=int(largest), sorted=1)
    shape = [*value.shape[:axis], count, *value.shape[axis + 1 :]]
    return Value(tuple(shape), value.dtype, names[0]), Value(tuple(shape), np.dtype(np.int64), names[1])


@translates("reduce_window_max")
def _max_pool(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    params, shape = equation.params, equation.shapes[0]
    windows, strides, padding = (params[name] for name in ("window_dimensions", "window_strides", "padding"))
    if any(size != 1 for size in params["base_dilation"]):
        raise UntranslatableError("pools an array with numbers between its own")
    pooled = [axis for axis in range(len(shape)) if (windows[axis], strides[axis], padding[axis]) != (1, 1, (0, 0))]
    others = [axis for axis in range(len(shape)) if axis not in pooled]
    if len(others) < 2 or not 1 <= len(pooled) <= 3:
        raise UntranslatableError(f"pools along {len(pooled)} of {len(shape)} axes")
    order = [*others, *pooled]
    maps = graph.transpose(graph.whole(inputs[0], shape), order)
    # ONNX wants two axes in front of the map's.
    maps = graph.reshape(maps, [int(np.prod(maps.shape[: len(others) - 1])), *maps.shape[len(others) - 1 :]])
    moved = [equation.out_shapes[0][axis] for axis in order]
    found = graph.node(
        "MaxPool",
        [maps],
        [*maps.shape[:2], *moved[len(others) :]],
        maps.dtype,
        kernel_shape=[int(windows[axis]) for axis in pooled],
        strides=[int(strides[axis]) for axis in pooled],
        dilations=[int(params["window_dilation"][axis]) for axis in pooled],
        pads=[int(padding[axis][0]) for axis in pooled] + [int(padding[axis][1]) for axis in pooled],
    )
    return [graph.transpose(graph.reshape(found, moved), np.argsort(order).tolist())]
