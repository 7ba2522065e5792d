"""Says how far the merges have come: how much the primary path takes of the auxiliary ones."""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from hpr_jax.weights.official_names import dotted_path

log = logging.getLogger("hpr_jax")

# A merge none of whose weights is further from where it began has not been learned.
MOVED = 0.05


def log_merges(params: nnx.State, initial: Any) -> None:
    """Logs the mean size of the weights of each path in the merges of every layer, and names those that have hardly moved.
    Weights of channels differ in sign, so that their mean says little.

    Args:
      params: the detector's trained variables; merges with fixed weights are not among them.
      initial: what the weights of the paths began with, the primary one first; None if they were drawn at random.
    """
    for name, layer, weights in _merges(params):
        paths = ", ".join(f"{weight:.3f}" for weight in _sizes(weights))
        log.info("%s of layer %d: weights of mean size (%s) of the paths, the primary one first", name, layer, paths)
        if initial is not None and np.max(np.abs(weights - np.asarray(initial))) < MOVED:
            log.warning(
                "No weight of %s of layer %d moved by %g: the auxiliary refiners are used as at the beginning. Train longer "
                "or set a larger config.optimizer.merge_multiplier.",
                name,
                layer,
                MOVED,
            )


def merge_sizes(params: nnx.State, paths: Sequence[str]) -> dict[str, float]:
    """The mean size of the weights of each path in each learned merge, by names like `merge/attention/layer_0/deformable`.

    Args:
      params: the detector's trained variables.
      paths: the names of the refiners, the primary one first; if several are the same, they are numbered.
    """
    names = [path if paths.count(path) == 1 else f"{path}_{number}" for number, path in enumerate(paths)]
    return {
        f"merge/{name.removeprefix('merge_')}/layer_{layer}/{path}": float(size)
        for name, layer, weights in _merges(params)
        for path, size in zip(names, _sizes(weights))
    }


def _sizes(weights: np.ndarray) -> np.ndarray:
    """The mean absolute weight of each path, of weights `[..., paths]`: `[paths]`."""
    return np.abs(weights).reshape(-1, weights.shape[-1]).mean(axis=0)


def _merges(params: nnx.State) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, layer and weights `[..., paths]` of each learned merge."""
    for path, variable in nnx.to_flat_state(params):
        merge = re.search(r"\.(merge_\w+)\.weights$", dotted_path(path))
        if merge:
            for layer, weights in enumerate(np.asarray(variable.get_value())):
                yield merge[1], layer, weights
