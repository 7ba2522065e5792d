"""Reading and writing at computed places."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpr_jax.inference.onnx.elementwise import where
from hpr_jax.inference.onnx.graph import Graph, Value, integers
from hpr_jax.inference.onnx.shapes import concatenated, padded, sliced
from hpr_jax.inference.onnx.table import Equation, UntranslatableError, translates

# How `jax.lax.GatherScatterMode` names what happens to places outside of the array.
_CLIP, _FILL, _PROMISE = "CLIP", "FILL_OR_DROP", "PROMISE_IN_BOUNDS"


@translates("gather")
def _gather(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    """Reads windows, whose sizes are `slice_sizes`, at places along the axes `start_index_map`.

    The axes that places count along come first, and `GatherND` reads the rest of the axes whole.
    """
    numbers, sizes, mode = equation.params["dimension_numbers"], equation.params["slice_sizes"], equation.params["mode"].name
    array, indices = (graph.whole(*pair) for pair in zip(inputs, equation.shapes))
    batch = indices.shape[:-1]
    if mode not in (_CLIP, _FILL, _PROMISE):
        raise UntranslatableError(f"has the mode {mode}")
    places, inside = _places(graph, indices, numbers.start_index_map, array.shape, sizes, mode)
    for axis, along in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        places[axis] = _count(batch, along)
    # A window that is as large as the array has one place. Of other axes that no places count along, only a part is read.
    places = {axis: place for axis, place in places.items() if sizes[axis] < array.shape[axis] or sizes[axis] == 1}
    rest = [axis for axis in range(len(sizes)) if axis not in places]
    array = sliced(
        graph, array, array.shape, [0] * len(sizes), [sizes[a] if a in rest else n for a, n in enumerate(array.shape)]
    )
    windows = [axis for axis in places if sizes[axis] > 1]
    found = _read(
        graph, array, _windows(graph, places, sizes, batch), list(places), batch + tuple(sizes[a] for a in windows)
    )

    # The axes of the result: those of the batch, then those of the windows.
    order = [*(f"batch {axis}" for axis in range(len(batch))), *windows, *rest]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = iter([axis for axis in range(len(sizes)) if axis not in gone])
    left = iter(f"batch {axis}" for axis in range(len(batch)))
    wanted = [next(kept) if axis in numbers.offset_dims else next(left) for axis in range(len(equation.out_shapes[0]))]
    found = graph.transpose(found, [order.index(axis) for axis in wanted if axis in order])
    found = graph.reshape(found, equation.out_shapes[0])
    if inside is None:
        return [found]
    names = {f"batch {axis}" for axis in range(len(batch))}
    inside = graph.reshape(inside, [n if axis in names else 1 for axis, n in zip(wanted, found.shape)])
    filler = _filler(equation.params["fill_value"], found.dtype)
    return [where(graph, inside, found, filler)]


def _filler(value: Any, dtype: np.dtype) -> Value:
    """What is read outside of an array; JAX's own choice if it is None."""
    if value is None:
        kinds = {"f": np.nan, "b": True, "i": lambda: np.iinfo(dtype).min, "u": lambda: np.iinfo(dtype).max}
        chosen = kinds[dtype.kind]
        value = chosen() if callable(chosen) else chosen
    return Value.constant(value, dtype)


def _places(
    graph: Graph, indices: Value, axes: Sequence[int], shape: Sequence[int], sizes: Sequence[int], mode: str
) -> tuple[dict[int, Value], Value | None]:
    """Places int64 `[*batch]` along each axis, within the array, and whether they were; None if that does not matter.

    Args:
      indices: `[*batch, n]`, whose last axis counts `axes`.
      shape, sizes: of the array, and of a window.
    """
    places, inside = {}, None
    batch = indices.shape[:-1]
    for number, axis in enumerate(axes):
        starts, ends = [0] * len(indices.shape), list(indices.shape)
        starts[-1], ends[-1] = number, number + 1
        place = graph.reshape(graph.cast(sliced(graph, indices, indices.shape, starts, ends), np.int64), batch)
        low, high = Value.constant(0, np.int64), Value.constant(shape[axis] - sizes[axis], np.int64)
        if mode == _FILL:
            bounds = [graph.elementwise("GreaterOrEqual", [place, low], bool)]
            bounds.append(graph.elementwise("LessOrEqual", [place, high], bool))
            for bound in bounds:
                inside = bound if inside is None else graph.elementwise("And", [inside, bound], bool)
        if mode != _PROMISE:
            place = graph.elementwise("Min", [graph.elementwise("Max", [place, low], np.int64), high], np.int64)
        places[int(axis)] = place
    return places, inside


def _count(shape: Sequence[int], axis: int) -> Value:
    """The place along one axis, int64, kept as it is before it is repeated to the shape."""
    return Value.constant(np.arange(shape[axis]).reshape([n if a == axis else 1 for a, n in enumerate(shape)]), np.int64)


def _windows(graph: Graph, places: dict[int, Value], sizes: Sequence[int], batch: Sequence[int]) -> list[Value]:
    """The places of all numbers of the windows along each axis: int64 `[*batch, *sizes above 1]`, or repeated to that."""
    wide = [axis for axis in places if sizes[axis] > 1]
    found = []
    for axis, place in places.items():
        place = graph.reshape(place, [*place.shape, *[1] * len(wide)])
        if axis in wide:
            inner = _count([sizes[one] for one in wide], wide.index(axis))
            assert inner.array is not None
            steps = inner.folded(inner.array.reshape([*[1] * len(batch), *inner.shape]))
            place = graph.elementwise("Add", [place, steps], np.int64)
        found.append(place)
    return found


def _read(graph: Graph, array: Value, places: list[Value], axes: list[int], shape: Sequence[int]) -> Value:
    """What an array has at places along axes: `[*shape, *the other axes]`."""
    rest = [axis for axis in range(len(array.shape)) if axis not in axes]
    sizes = [*shape, *(array.shape[axis] for axis in rest)]
    if not axes:
        return graph.whole(graph.reshape(array, [*[1] * len(shape), *array.shape]), sizes)
    array = graph.transpose(array, [*axes, *rest])
    if len(axes) == 1:
        return graph.node("Gather", [array, graph.whole(places[0], shape)], sizes, array.dtype, axis=0)
    return graph.node("GatherND", [array, _together(graph, places, shape)], sizes, array.dtype)


def _together(graph: Graph, places: Sequence[Value], shape: Sequence[int]) -> Value:
    """Places along several axes, int64 `[*shape, n]`."""
    return concatenated(graph, [graph.reshape(graph.whole(place, shape), [*shape, 1]) for place in places], len(shape))


@translates("scatter", "scatter-add")
def _scatter(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    """Writes numbers, or adds them, at places along axes `scatter_dims_to_operand_dims`; other axes are written whole."""
    numbers, mode = equation.params["dimension_numbers"], equation.params["mode"].name
    array, indices, updates = (graph.whole(*pair) for pair in zip(inputs, equation.shapes))
    batch, shape, sizes = indices.shape[:-1], array.shape, [1] * len(array.shape)
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    axes = [*numbers.operand_batching_dims, *numbers.scatter_dims_to_operand_dims]
    rest = [axis for axis in range(len(shape)) if axis not in gone]
    written = [updates.shape[axis] for axis in numbers.update_window_dims]
    if mode not in (_FILL, _PROMISE) or not gone.issuperset(axes) or written != [shape[axis] for axis in rest]:
        raise UntranslatableError("writes windows")
    if not axes:
        return [graph.elementwise("Add", [array, updates], array.dtype) if equation.name == "scatter-add" else updates]
    places, inside = _places(graph, indices, numbers.scatter_dims_to_operand_dims, shape, sizes, mode)
    if inside is not None:
        # What is outside goes to a number behind the others along the first axis, which is taken away in the end.
        first = int(numbers.scatter_dims_to_operand_dims[0])
        behind = Value.constant(shape[first], np.int64)
        places[first] = graph.elementwise("Where", [inside, places[first], behind], np.int64)
        filler = Value.constant(0, array.dtype)
        array = padded(graph, array, filler, [(0, int(axis == first)) for axis in range(len(shape))])
    for axis, along in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims):
        places[axis] = _count(batch, along)
    order = [*axes, *rest]
    moved = graph.transpose(array, order)
    windows = set(numbers.update_window_dims)
    outer = [axis for axis in range(len(updates.shape)) if axis not in windows]
    updates = graph.transpose(updates, [*outer, *numbers.update_window_dims])
    index = _together(graph, [places[axis] for axis in axes], batch)
    reduction = "add" if equation.name == "scatter-add" else "none"
    moved = graph.node("ScatterND", [moved, index, updates], moved.shape, array.dtype, reduction=reduction)
    found = graph.transpose(moved, np.argsort(order).tolist())
    return [sliced(graph, found, found.shape, [0] * len(shape), shape)]


@translates("dynamic_slice")
def _dynamic_slice(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    array, shape, sizes = graph.whole(inputs[0], equation.shapes[0]), equation.shapes[0], equation.params["slice_sizes"]
    axes = [axis for axis in range(len(shape)) if sizes[axis] < shape[axis]]
    if not axes:
        return [array]
    starts = concatenated(graph, [graph.cast(graph.reshape(inputs[1 + axis], [1]), np.int64) for axis in axes], 0)
    most = integers([shape[axis] - sizes[axis] for axis in axes])
    starts = graph.elementwise("Min", [graph.elementwise("Max", [starts, integers([0])], np.int64), most], np.int64)
    ends = graph.elementwise("Add", [starts, integers([sizes[axis] for axis in axes])], np.int64)
    return [graph.node("Slice", [array, starts, ends, integers(axes)], sizes, array.dtype)]
