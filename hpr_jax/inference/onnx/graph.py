"""A graph of ONNX nodes that grows by one operation at a time.

Three things keep it small and quick. A result that is repeated along axes is kept as it is before it is repeated, as ONNX's
operations repeat by themselves. A node that was there before is not made again. And a node of a loop's body that does not
depend on the loop is made outside of it.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

# The version of ONNX's operators, and of its files: those of ONNX 1.15 and ONNX Runtime 1.17, of the end of 2023.
OPSET: Final = 20
IR_VERSION: Final = 9


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array of the program.

    Attributes:
      shape: as it is kept: 1 along axes that it is repeated along, else that of the array.
      dtype: of NumPy.
      name: of the tensor in the graph; None for a constant, which enters the graph when a node reads it.
      array: of a constant.
      label: what the constant is called in the graph, if it has a name.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str | None = None
    array: np.ndarray | None = None
    label: str = ""

    @classmethod
    def constant(cls, array: Any, dtype: Any = None, label: str = "") -> "Value":
        array = np.asarray(array, dtype)
        return cls(array.shape, array.dtype, None, array, label)

    def folded(self, array: np.ndarray) -> "Value":
        """A constant that was made of this one by moving its numbers."""
        return Value(array.shape, array.dtype, None, array, self.label)


@dataclasses.dataclass
class Scope:
    """The nodes of a graph or of a body within it, `known` by what they compute."""

    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    known: dict[Any, list[str]] = dataclasses.field(default_factory=dict)


class Graph:
    """Nodes and constants, and the bodies of loops that are under way."""

    def __init__(self) -> None:
        self._scopes = [Scope()]
        self._depths: dict[str, int] = {}
        self._initializers: dict[str, np.ndarray] = {}
        self._constants: dict[Any, str] = {}
        self._numbers = itertools.count()

    def input(self, name: str, shape: Sequence[int], dtype: Any) -> Value:
        """A value that comes from outside, into the innermost scope."""
        self._depths[name] = len(self._scopes) - 1
        return Value(tuple(shape), np.dtype(dtype), name)

    def unique(self, prefix: str) -> str:
        return f"{prefix}_{next(self._numbers)}"

    def name(self, value: Value) -> str:
        """The name by which nodes read a value."""
        if value.name is not None:
            return value.name
        assert value.array is not None
        array = np.ascontiguousarray(value.array).reshape(value.shape)
        key = array.shape, array.dtype.str, hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
        if key not in self._constants:
            name = value.label if value.label and value.label not in self._initializers else ""
            self._constants[key] = name or self.unique(value.label or "constant")
            self._initializers[self._constants[key]] = array
            self._depths[self._constants[key]] = 0
        return self._constants[key]

    def nodes(self, operator: str, inputs: Sequence[Value | None], count: int, **attributes: Any) -> list[str]:
        """The names of a node's results. It is made in the outermost scope that has its arguments, unless it is there.

        Args:
          operator: of ONNX.
          inputs: its arguments; None for one that is left out.
          count: number of its results.
        """
        names = ["" if value is None else self.name(value) for value in inputs]
        key = operator, tuple(names), tuple(sorted((name, _hashable(value)) for name, value in attributes.items()))
        for scope in self._scopes:
            if key in scope.known:
                return scope.known[key]
        depth = max((self._depths[name] for name in names if name), default=0)
        return self._add(depth, key, helper.make_node(operator, names, self._fresh(operator, count, depth), **attributes))

    def _fresh(self, operator: str, count: int, depth: int) -> list[str]:
        names = [self.unique(operator) for _ in range(count)]
        self._depths.update(dict.fromkeys(names, depth))
        return names

    def _add(self, depth: int, key: Any, node: onnx.NodeProto) -> list[str]:
        scope = self._scopes[depth]
        scope.nodes.append(node)
        scope.known[key] = list(node.output)
        return scope.known[key]

    def node(
        self, operator: str, inputs: Sequence[Value | None], shape: Sequence[int], dtype: Any, **attributes: Any
    ) -> Value:
        """The only result of a node, of a shape and type; see `nodes`."""
        (name,) = self.nodes(operator, inputs, 1, **attributes)
        return Value(tuple(shape), np.dtype(dtype), name)

    def elementwise(self, operator: str, inputs: Sequence[Value], dtype: Any, **attributes: Any) -> Value:
        """The result of an operation on each number, repeated along no axes that all arguments are repeated along."""
        shape = np.broadcast_shapes(*(value.shape for value in inputs))
        return self.node(operator, inputs, shape, dtype, **attributes)

    def cast(self, value: Value, dtype: Any) -> Value:
        dtype = np.dtype(dtype)
        if value.dtype == dtype:
            return value
        if value.array is not None:
            return value.folded(value.array.astype(dtype))
        return self.elementwise("Cast", [value], dtype, to=helper.np_dtype_to_tensor_dtype(dtype))

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """The value as it is kept, in another shape."""
        if value.shape == tuple(shape):
            return value
        if value.array is not None:
            return value.folded(value.array.reshape(shape))
        return self.node("Reshape", [value, integers(shape)], shape, value.dtype, allowzero=1)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """The value as it is kept, with its axes in another order."""
        if list(order) == sorted(order):
            return value
        if value.array is not None:
            return value.folded(value.array.transpose(order))
        shape = [value.shape[axis] for axis in order]
        return self.node("Transpose", [value], shape, value.dtype, perm=[int(axis) for axis in order])

    def whole(self, value: Value, shape: Sequence[int]) -> Value:
        """The value, repeated to its shape."""
        if value.shape == tuple(shape):
            return value
        if 0 in shape:
            # ONNX repeats no number of times as once.
            return Value.constant(np.zeros(shape), value.dtype)
        return self.node("Expand", [value, integers(shape)], shape, value.dtype)

    def begin_body(self) -> None:
        """Opens the body of a loop or branch."""
        self._scopes.append(Scope())

    def end_body(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> onnx.GraphProto:
        """Closes the body; its results are made by nodes of its own, as ONNX demands."""
        depth, named = len(self._scopes) - 1, []
        for value in outputs:
            node = helper.make_node("Identity", [self.name(value)], self._fresh("result", 1, depth))
            self._scopes[-1].nodes.append(node)
            named.append(Value(value.shape, value.dtype, node.output[0]))
        scope = self._scopes.pop()
        return helper.make_graph(_needed(scope.nodes, named), self.unique("body"), _infos(inputs), _infos(named))

    def with_bodies(
        self,
        operator: str,
        inputs: Sequence[Value | None],
        count: int,
        bodies: dict[str, onnx.GraphProto],
        **attributes: Any,
    ) -> list[str]:
        """The results of a loop or a choice. It is made in the innermost scope, as its bodies read what is there."""
        names, depth = ["" if value is None else self.name(value) for value in inputs], len(self._scopes) - 1
        node = helper.make_node(operator, names, self._fresh(operator, count, depth), **bodies, **attributes)
        return self._add(depth, object(), node)

    def proto(self, name: str, inputs: Sequence[Value], outputs: dict[str, Value]) -> onnx.GraphProto:
        """The finished graph, without what its results do not need."""
        (scope,) = self._scopes
        renamed = [helper.make_node("Identity", [self.name(value)], [name]) for name, value in outputs.items()]
        results = [Value(value.shape, value.dtype, name) for name, value in outputs.items()]
        nodes = _needed([*scope.nodes, *renamed], results)
        read = {name for node in nodes for name in _reads(node)}
        constants = [numpy_helper.from_array(a, n) for n, a in self._initializers.items() if n in read]
        return helper.make_graph(nodes, name, _infos(inputs), _infos(results), constants)


def integers(numbers: Sequence[int]) -> Value:
    """What ONNX takes shapes, axes and places in: int64 `[n]`."""
    return Value.constant([int(number) for number in numbers], np.int64)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _infos(values: Sequence[Value]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(str(value.name), helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for value in values
    ]


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, its bodies too."""
    inner = {name for body in _bodies(node) for one in body.node for name in _reads(one)}
    return {*node.input, *inner}


def _needed(nodes: Sequence[onnx.NodeProto], results: Sequence[Value]) -> list[onnx.NodeProto]:
    """The nodes that results depend on, in their order."""
    wanted, kept = {value.name for value in results}, []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted |= _reads(node)
            kept.append(node)
    return kept[::-1]
