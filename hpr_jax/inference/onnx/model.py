"""A JAX function as an ONNX model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper

# They add to the table.
from hpr_jax.inference.onnx import elementwise, functions, gather, loops, products, reductions, shapes  # noqa: F401
from hpr_jax.inference.onnx.graph import IR_VERSION, OPSET, Graph, Value
from hpr_jax.inference.onnx.translate import outputs_of

Tree = Any


def onnx_model(
    function: Callable[..., dict[str, jax.Array]],
    weights: Mapping[str, np.ndarray],
    arguments: Mapping[str, jax.ShapeDtypeStruct],
    *,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Translates a function.

    Args:
      function: takes a dictionary of weights, then the arguments in their order, and returns a dictionary of arrays.
      weights: constants of the model, under these names.
      arguments: shapes and types of the model's inputs by their names.
      metadata: texts that the model carries.

    Raises:
      UntranslatableError: an operation has no translation.
    """
    abstract = {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in weights.items()}
    traced, results = jax.make_jaxpr(function, return_shape=True)(abstract, *arguments.values())
    graph = Graph()
    inputs = [graph.input(name, one.shape, one.dtype) for name, one in arguments.items()]
    # The order of leaves is JAX's: that of sorted keys.
    constants = [Value.constant(weights[name], label=name) for name in sorted(weights)]
    found = outputs_of(graph, traced, [*constants, *inputs])
    whole = [graph.whole(value, aval.shape) for value, aval in zip(found, traced.out_avals)]
    proto = graph.proto("detector", inputs, dict(zip(sorted(results), whole)))
    model = helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="hpr_jax"
    )
    helper.set_model_props(model, dict(metadata or {}))
    return model
