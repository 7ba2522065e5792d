"""How a backward pass goes from one compiled program to another."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Variable:
    """Stands for a leaf of a tree that both programs have, by its number."""

    number: int


@flax.struct.dataclass
class Scalar:
    """Stands for a number, which has no axis at which to join those of the devices `[devices]`."""

    numbers: jax.Array


def split_floats(tree):
    """A tree's floats and its other leaves, None where the leaf is in the other tree."""
    is_float = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)
    return (
        jax.tree.map(lambda x, keep: x if keep else None, tree, is_float),
        jax.tree.map(lambda x, keep: None if keep else x, tree, is_float),
    )


def join_floats(floats, others):
    return jax.tree.map(lambda a, b: b if a is None else a, floats, others, is_leaf=lambda x: x is None)


def without_variables(tree, state):
    """The tree with a `Variable` for each leaf of the state, which the other program has anyhow, and a `Scalar` for each
    other number."""
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(state))}

    def replaced(leaf):
        if id(leaf) in numbers:
            return Variable(numbers[id(leaf)])
        return leaf if leaf.ndim else Scalar(leaf[None])

    return jax.tree.map(replaced, tree)


def with_variables(tree, state):
    """Undoes `without_variables`."""
    leaves = jax.tree.leaves(state)

    def replaced(leaf):
        if isinstance(leaf, Variable):
            return leaves[leaf.number]
        return leaf.numbers[0] if isinstance(leaf, Scalar) else leaf

    return jax.tree.map(replaced, tree, is_leaf=lambda leaf: isinstance(leaf, Variable | Scalar))
