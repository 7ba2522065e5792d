"""Says how far the merges have come: how much the primary path takes of the auxiliary ones."""

import logging
import re
from collections.abc import Iterator
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
        paths = ", ".join(f"{weight:.3f}" for weight in np.abs(weights).reshape(-1, weights.shape[-1]).mean(axis=0))
        log.info("%s of layer %d: weights of mean size (%s) of the paths, the primary one first", name, layer, paths)
        if initial is not None and np.max(np.abs(weights - np.asarray(initial))) < MOVED:
            log.warning(
                "No weight of %s of layer %d moved by %g: the auxiliary refiners are used as at the beginning. Train longer "
                "or set a larger config.optimizer.merge_multiplier.",
                name,
                layer,
                MOVED,
            )


def _merges(params: nnx.State) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, layer and weights `[..., paths]` of each learned merge."""
    for path, variable in nnx.to_flat_state(params):
        merge = re.search(r"\.(merge_\w+)\.weights$", dotted_path(path))
        if merge:
            for layer, weights in enumerate(np.asarray(variable.get_value())):
                yield merge[1], layer, weights
