"""The way of a backward pass from one compiled program to another.

`jax.vjp` returns a pullback, a function that is a pytree of arrays. The forward program returns it, and the backward program
takes it. Arrays that both programs have anyway, those of the state, are replaced by their numbers on the way.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Variable:
    """Stands for a leaf of the state, by its number among the leaves."""

    number: int


@flax.struct.dataclass
class Scalar:
    """Holds a number of each device, `[devices]`, since a number alone has no axis along which devices could be joined."""

    numbers: jax.Array


def split_floats(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into one of its floating-point leaves and one of the others; None stands where the other has a leaf."""
    is_float = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)
    return (
        jax.tree.map(lambda x, keep: x if keep else None, tree, is_float),
        jax.tree.map(lambda x, keep: None if keep else x, tree, is_float),
    )


def join_floats(floats: Any, others: Any) -> Any:
    """The tree that `split_floats` split."""
    return jax.tree.map(lambda a, b: b if a is None else a, floats, others, is_leaf=lambda x: x is None)


def without_variables(tree: Any, state: Any) -> Any:
    """Replaces leaves of the state in a tree by `Variable`s, and other numbers by `Scalar`s."""
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(state))}

    def replaced(leaf):
        if id(leaf) in numbers:
            return Variable(numbers[id(leaf)])
        return leaf if leaf.ndim else Scalar(leaf[None])

    return jax.tree.map(replaced, tree)


def with_variables(tree: Any, state: Any) -> Any:
    """The tree from which `without_variables` took the leaves of the state."""
    leaves = jax.tree.leaves(state)

    def replaced(leaf):
        if isinstance(leaf, Variable):
            return leaves[leaf.number]
        return leaf.numbers[0] if isinstance(leaf, Scalar) else leaf

    return jax.tree.map(replaced, tree, is_leaf=lambda leaf: isinstance(leaf, Variable | Scalar))
