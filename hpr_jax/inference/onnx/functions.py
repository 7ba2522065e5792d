"""Functions of this project that ONNX has as one operation; jaxprs call them by name."""

from collections.abc import Sequence

from hpr_jax.inference.onnx.graph import Graph, Value
from hpr_jax.inference.onnx.table import FUNCTIONS, Equation
from hpr_jax.ops import grid_sample


def _grid_sample(graph: Graph, equation: Equation, inputs: Sequence[Value]) -> Sequence[Value]:
    whole = [graph.whole(*pair) for pair in zip(inputs, equation.shapes)]
    settings = {"mode": "linear", "padding_mode": "zeros", "align_corners": 0}
    return [graph.node("GridSample", whole, equation.out_shapes[0], equation.out_dtypes[0], **settings)]


FUNCTIONS[grid_sample.NAME] = _grid_sample
