"""Matrix products and convolutions."""

from collections.abc import Sequence

import numpy as np

from hpr_jax.inference.onnx.graph import Graph, Value
from hpr_jax.inference.onnx.table import Equation, UntranslatableError, translates


@translates("dot_general")
def _product(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    (left_sums, right_sums), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (graph.whole(*pair) for pair in zip(inputs, equation.shapes))
    left_free = [axis for axis in range(len(left.shape)) if axis not in (*left_sums, *left_batch)]
    right_free = [axis for axis in range(len(right.shape)) if axis not in (*right_sums, *right_batch)]
    left = graph.transpose(left, [*left_batch, *left_free, *left_sums])
    right = graph.transpose(right, [*right_batch, *right_sums, *right_free])
    count, outputs = len(left_batch), equation.out_shapes[0]
    batch, summed = list(left.shape[:count]), int(np.prod(left.shape[count + len(left_free) :]))
    right = graph.reshape(right, [*batch, summed, int(np.prod(right.shape[count + len(right_sums) :]))])
    # Without a batch, ONNX multiplies arrays of any number of axes by a matrix.
    rows = left.shape[count : count + len(left_free)]
    rows = rows if count == 0 and rows else (int(np.prod(rows)),)
    left = graph.reshape(left, [*batch, *rows, summed])
    found = graph.node("MatMul", [left, right], [*batch, *rows, right.shape[-1]], left.dtype)
    return [graph.cast(graph.reshape(found, outputs), equation.out_dtypes[0])]


@translates("conv_general_dilated")
def _convolution(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    params, (x, kernel) = equation.params, (graph.whole(*pair) for pair in zip(inputs, equation.shapes))
    if params["batch_group_count"] != 1 or any(step != 1 for step in params["lhs_dilation"]):
        raise UntranslatableError("has a dilated image or groups of images")
    numbers = params["dimension_numbers"]
    x, kernel = graph.transpose(x, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)
    lows, highs = zip(*params["padding"])
    found = graph.node(
        "Conv",
        [x, kernel],
        [equation.out_shapes[0][axis] for axis in numbers.out_spec],
        x.dtype,
        strides=[int(step) for step in params["window_strides"]],
        dilations=[int(step) for step in params["rhs_dilation"]],
        pads=[int(amount) for amount in (*lows, *highs)],
        group=int(params["feature_group_count"]),
    )
    return [graph.cast(graph.transpose(found, np.argsort(numbers.out_spec).tolist()), equation.out_dtypes[0])]
