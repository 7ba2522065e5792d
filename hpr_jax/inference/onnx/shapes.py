"""Operations that move numbers, and make arrays of places."""

from collections.abc import Sequence

import numpy as np

from hpr_jax.inference.onnx.graph import Graph, Value, integers
from hpr_jax.inference.onnx.table import Equation, UntranslatableError, translates

# A constant that is repeated becomes no larger constant than of so many numbers.
LARGEST_CONSTANT = 2**16


@translates("iota")
def _iota(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    axis, shape = equation.params["dimension"], equation.out_shapes[0]
    kept = [size if place == axis else 1 for place, size in enumerate(shape)]
    return [Value.constant(np.arange(shape[axis]).reshape(kept), equation.out_dtypes[0])]


@translates("broadcast_in_dim")
def _broadcast(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    kept = [1] * len(equation.out_shapes[0])
    for axis, size in zip(equation.params["broadcast_dimensions"], inputs[0].shape):
        kept[axis] = size
    return [graph.reshape(inputs[0], kept)]


@translates("reshape")
def _reshape(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    if equation.params.get("dimensions") is not None:
        raise UntranslatableError("moves axes")
    old, new = equation.shapes[0], equation.out_shapes[0]
    if [size for size in old if size != 1] == [size for size in new if size != 1]:
        # Axes of one number come and go, and what is repeated stays so.
        sizes = iter([kept for kept, size in zip(inputs[0].shape, old) if size != 1])
        return [graph.reshape(inputs[0], [1 if size == 1 else next(sizes) for size in new])]
    return [graph.reshape(_whole(graph, inputs[0], old), new)]


@translates("squeeze")
def _squeeze(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    gone = {axis % len(equation.shapes[0]) for axis in equation.params["dimensions"]}
    return [graph.reshape(inputs[0], [size for axis, size in enumerate(inputs[0].shape) if axis not in gone])]


@translates("expand_dims")
def _expand_dims(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    sizes, new = iter(inputs[0].shape), set(equation.params["dimensions"])
    return [graph.reshape(inputs[0], [1 if axis in new else next(sizes) for axis in range(len(equation.out_shapes[0]))])]


@translates("transpose")
def _transpose(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [graph.transpose(inputs[0], equation.params["permutation"])]


@translates("slice")
def _slice(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    params = equation.params
    strides = params["strides"] or (1,) * len(equation.shapes[0])
    return [sliced(graph, inputs[0], equation.shapes[0], params["start_indices"], params["limit_indices"], strides)]


def sliced(
    graph: Graph,
    value: Value,
    shape: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    strides: Sequence[int] | None = None,
) -> Value:
    """A part of an array `shape`, with a start, an end and a positive stride along each axis."""
    strides = strides or (1,) * len(shape)
    cut = [
        axis
        for axis, (size, start, end, stride) in enumerate(zip(shape, starts, ends, strides))
        if (start, end, stride) != (0, size, 1)
    ]
    # Along axes that it is repeated along, the part is as the whole.
    cut = [axis for axis in cut if value.shape[axis] == shape[axis]]
    if not cut:
        return value
    if value.array is not None:
        places = [slice(None)] * len(shape)
        for axis in cut:
            places[axis] = slice(starts[axis], ends[axis], strides[axis])
        return value.folded(value.array[tuple(places)])
    kept = [
        max(0, -(-(ends[axis] - starts[axis]) // strides[axis])) if axis in cut else size
        for axis, size in enumerate(value.shape)
    ]
    given = [integers([numbers[axis] for axis in cut]) for numbers in (starts, ends)]
    return graph.node("Slice", [value, *given, integers(cut), integers([strides[a] for a in cut])], kept, value.dtype)


@translates("split")
def _split(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    axis, shape = equation.params["axis"], equation.shapes[0]
    ends = np.cumsum(equation.params["sizes"])
    parts = []
    for end, size in zip(ends, equation.params["sizes"]):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = int(end - size), int(end)
        parts.append(sliced(graph, inputs[0], shape, starts, limits))
    return parts


@translates("rev")
def _reverse(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    (value,), axes = inputs, equation.params["dimensions"]
    if value.array is not None:
        return [value.folded(np.flip(value.array, axes))]
    ones = [1] * len(axes)
    # A slice with a negative stride ends before its end, which must be in front of the first number.
    ends = integers([np.iinfo(np.int64).min + 1] * len(axes))
    given = [integers([-one for one in ones]), ends, integers(axes), integers([-one for one in ones])]
    return [graph.node("Slice", [value, *given], value.shape, value.dtype)]


@translates("concatenate")
def _concatenate(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [
        concatenated(graph, [_whole(graph, *pair) for pair in zip(inputs, equation.shapes)], equation.params["dimension"])
    ]


def concatenated(graph: Graph, values: Sequence[Value], axis: int) -> Value:
    """Arrays, none of which is repeated, behind one another."""
    values = [value for value in values if value.shape[axis]] or values[:1]
    if len(values) == 1:
        return values[0]
    if all(value.array is not None for value in values):
        return Value.constant(np.concatenate([value.array for value in values if value.array is not None], axis))
    shape = list(values[0].shape)
    shape[axis] = sum(value.shape[axis] for value in values)
    return graph.node("Concat", values, shape, values[0].dtype, axis=int(axis))


@translates("stack")
def _stack(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    return [stacked(graph, [_whole(graph, *pair) for pair in zip(inputs, equation.shapes)], equation.params["axis"])]


def stacked(graph: Graph, values: Sequence[Value], axis: int) -> Value:
    """Arrays, none of which is repeated, along a new axis."""
    apart = [graph.reshape(value, [*value.shape[:axis], 1, *value.shape[axis:]]) for value in values]
    return concatenated(graph, apart, axis)


@translates("unstack")
def _unstack(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    axis, count = equation.params["axis"], len(equation.out_shapes)
    return [taken(graph, inputs[0], equation.shapes[0], axis, place) for place in range(count)]


def taken(graph: Graph, value: Value, shape: Sequence[int], axis: int, place: int) -> Value:
    """The part of an array at a place along an axis, without that axis."""
    starts, ends = [0] * len(shape), list(shape)
    starts[axis], ends[axis] = place, place + 1
    part = sliced(graph, value, shape, starts, ends)
    return graph.reshape(part, [*part.shape[:axis], *part.shape[axis + 1 :]])


@translates("pad")
def _pad(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    (value, filler), config, shape = inputs, equation.params["padding_config"], equation.shapes[0]
    if any(inner for _, _, inner in config):
        raise UntranslatableError("puts numbers between those of an array")
    value = padded(graph, _whole(graph, value, shape), filler, [(max(0, low), max(0, high)) for low, high, _ in config])
    # A negative number takes away.
    starts = [max(0, -low) for low, _, _ in config]
    ends = [size - max(0, -high) for size, (_, high, _) in zip(value.shape, config)]
    return [sliced(graph, value, value.shape, starts, ends)]


def padded(graph: Graph, value: Value, filler: Value, amounts: Sequence[tuple[int, int]]) -> Value:
    """An array that is not repeated, with so many numbers in front and behind along each axis."""
    if not any(low or high for low, high in amounts):
        return value
    shape = [int(size + low + high) for size, (low, high) in zip(value.shape, amounts)]
    pads = integers([low for low, _ in amounts] + [high for _, high in amounts])
    return graph.node("Pad", [value, pads, filler], shape, value.dtype)


def _whole(graph: Graph, value: Value, shape: Sequence[int]) -> Value:
    """The value, repeated to its shape; constants stay constants while they are small."""
    if value.array is not None and np.prod(shape) <= LARGEST_CONSTANT:
        return value.folded(np.broadcast_to(value.array, shape))
    return graph.whole(value, shape)
