"""How a batch is split into parts, over devices and over time, and joined again."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from hpr_jax.runtime.devices import EVERYWHERE, split_at
from hpr_jax.types import Outputs

# The axis of images in the arrays of each field of `Outputs`; in predictions of branches the axis of layers comes first.
_BATCH_AXES = {"primary": 1, "branches": 1, "proposals": 0, "dense_proposals": 0}

# How `Outputs` are split over devices: a tree of partition specs in place of arrays.
OUTPUTS: Any = Outputs(
    **{field: cast(Any, split_at(axis)) for field, axis in _BATCH_AXES.items()}, intermediates=cast(Any, EVERYWHERE)
)


def at_batch_axis(function: Callable[..., jax.Array], *outputs: Outputs) -> Outputs:
    """Applies function(axis, *arrays) to every array of the outputs, where `axis` is its axis of images."""
    return dataclasses.replace(
        outputs[0],
        **{
            field: jax.tree.map(partial(function, axis), *(getattr(one, field) for one in outputs))
            for field, axis in _BATCH_AXES.items()
        },
    )


def side_by_side(tree: Any) -> Any:
    """Makes the V views of an image neighbours: `[V, B, ...]` -> `[B * V, ...]`.

    Then splitting the images over devices splits the views in the same way, without a transfer.
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def part_of(x: jax.Array, part: jax.Array, parts: int, axis: int = 0) -> jax.Array:
    """Part number `part` of `parts` equal ones, along an axis of what one device has."""
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, part * size, size, axis)


def join_parts(parts: Sequence[jax.Array], devices: int, axis: int) -> jax.Array:
    """Joins all parts of an array that is split over devices; the inverse of `part_of` on each device."""
    if len(parts) == 1:
        return parts[0]
    by_device = [x.reshape(*x.shape[:axis], devices, -1, *x.shape[axis + 1 :]) for x in parts]
    joined = jnp.concatenate(by_device, axis=axis + 1)
    return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])


def take_part(x: jax.Array, part: int, parts: int, devices: int, axis: int) -> jax.Array:
    """Part number `part` of an array that `join_parts` made."""
    if parts == 1:
        return x
    by_device = x.reshape(*x.shape[:axis], devices, parts, -1, *x.shape[axis + 1 :])
    taken = jax.lax.index_in_dim(by_device, part, axis + 1, keepdims=False)
    return taken.reshape(*taken.shape[:axis], -1, *taken.shape[axis + 2 :])


def sum_over_devices(tree: Any) -> Any:
    """Sums every leaf `[devices, ...]` over the devices: -> `[...]`."""
    leaves, structure = jax.tree.flatten(tree)
    devices = len(leaves[0])
    if devices == 1:
        return jax.tree.map(lambda x: x[0], tree)
    # All leaves become one vector, so that there is one reduction instead of hundreds.
    total = jnp.sum(jnp.concatenate([x.reshape(devices, -1) for x in leaves], axis=1), axis=0)
    ends = np.cumsum([x[0].size for x in leaves])[:-1]
    return jax.tree.unflatten(structure, [part.reshape(x.shape[1:]) for part, x in zip(jnp.split(total, ends), leaves)])
