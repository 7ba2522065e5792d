"""Counts the floating-point operations of a traced function."""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from hpr_jax.analysis.scopes import scope_of

# A call of a kernel: its name, and the types of its operands as XLA writes them, like `bf16[3,5]`.
KernelCall = tuple[str, tuple[str, ...]]


class KernelCost(NamedTuple):
    """What a kernel says that it costs: floating-point operations, and bytes of device memory that it reads and writes."""

    flops: int
    bytes: int


def product_flops(jaxpr: Any) -> int:
    """Twice the multiply-adds of all matrix products and convolutions in a jaxpr and in the jaxprs inside it. A kernel with
    products takes the operations that it tells.

    The body of a scan counts as often as it runs. Of a conditional, the branch with the most operations counts. The body of
    a while loop counts once, since a jaxpr does not tell how often it runs; the detector's while loops have no products.
    """
    return flops_by_scope(jaxpr, ()).total()


def flops_by_scope(jaxpr: Any, names: Collection[str]) -> Counter[tuple[str, ...]]:
    """What `product_flops` counts, by the scopes of `jax.named_scope` that have one of these names, outer ones first."""
    counted: Counter[tuple[str, ...]] = Counter()
    for equation in jaxpr.eqns:
        outer = scope_of(str(equation.source_info.name_stack), names)
        for scope, flops in _equation_flops(equation, names).items():
            counted[outer + scope] += flops
    return counted


def _equation_flops(equation: Any, names: Collection[str]) -> Counter[tuple[str, ...]]:
    """The operations of an equation, by the scopes inside it."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        size = 2 * equation.outvars[0].aval.size
        return Counter({(): size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)})
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return Counter({(): 2 * equation.outvars[0].aval.size * (kernel.size // outputs)})
    if name == "pallas_call":
        # Weighted sums of rows are no products, in kernels as elsewhere.
        has_products = any(product_flops(jaxpr) for jaxpr in inner_jaxprs(equation))
        return Counter({(): params["cost_estimate"].flops if has_products and params["cost_estimate"] else 0})
    inner = [flops_by_scope(jaxpr, names) for jaxpr in inner_jaxprs(equation)]
    if name == "cond":
        return max(inner, key=Counter.total)
    rounds = params["length"] if name == "scan" else 1
    counted: Counter[tuple[str, ...]] = Counter()
    for one in inner:
        counted.update({scope: rounds * flops for scope, flops in one.items()})
    return counted


def kernel_costs(jaxpr: Any) -> dict[KernelCall, KernelCost]:
    """What the kernels cost that a jaxpr calls, and the jaxprs inside it, by their calls."""
    found: dict[KernelCall, KernelCost] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            cost = equation.params["cost_estimate"]
            if cost is not None:
                operands = tuple(_xla_type(variable.aval) for variable in equation.invars)
                found[equation.params["name"], operands] = KernelCost(cost.flops, cost.bytes_accessed)
            continue
        for inner in inner_jaxprs(equation):
            found |= kernel_costs(inner)
    return found


def _xla_type(aval: Any) -> str:
    """A type as XLA writes it."""
    dtype = np.dtype(aval.dtype)
    bits = 8 * dtype.itemsize
    name = {"bool": "pred", "bfloat16": "bf16"}.get(dtype.name) or f"{ {'i': 's'}.get(dtype.kind, dtype.kind) }{bits}"
    return f"{name}[{','.join(map(str, aval.shape))}]"


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters: of loops, branches, and functions that are called."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            # A closed jaxpr holds its jaxpr in an attribute.
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
