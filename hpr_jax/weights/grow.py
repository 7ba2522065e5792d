"""Makes an HPR detector out of a plain one: it begins as that detector, and learns to use its auxiliary refiners."""

import logging
import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.detector import Detector
from hpr_jax.weights.official_names import dotted_path

log = logging.getLogger("hpr_jax")

# Matches the paths of variables that a plain detector lacks.
_ADDED = re.compile(r"refiner\.layers\.(auxiliaries|merge_\w+)\.|refiner\.branch_norms\.|branch_heads\.")
# Variables of the auxiliary refiners and branches -> those of the primary one that they begin as. Their interactions have no
# counterpart, and begin anew.
_BEGINNINGS = (
    (r"refiner\.layers\.auxiliaries\.\d+\.(attention|norm\d|ffn)\.", r"refiner.layers.primary.\1."),
    (r"refiner\.branch_norms\.\d+\.", "refiner.norm."),
    (r"branch_heads\.\d+\.", "heads."),
)


def is_added(dotted: str) -> bool:
    """Whether our variable at this dotted path belongs to the auxiliary refiners, their branches or the merges."""
    return _ADDED.match(dotted) is not None


def begin_as_plain(detector: Detector, source: object) -> None:
    """Lets the auxiliary refiners begin as the primary one, whose weights are loaded, where they have the same parts.

    With merges that take the primary path alone, the detector then finds what the plain one finds.

    Args:
      detector: changed in place.
      source: what the weights come from, for messages.

    Raises:
      UserError: the merges begin otherwise, or cannot be learned.
    """
    state = nnx.state(detector)
    flat = {dotted_path(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    for dotted, (_, variable) in flat.items():
        if ".merge_" in dotted:
            _check_merge(variable, source)
    copied = []
    for dotted, (path, variable) in flat.items():
        for pattern, primary in _BEGINNINGS:
            match = re.match(pattern, dotted)
            if match:
                own = flat[match.expand(primary) + dotted[match.end() :]][1]
                # A copy: a training step gives its state away, and no array can be given away twice.
                copied.append((path, variable.replace(jnp.copy(own.get_value()))))
    nnx.update(detector, nnx.from_flat_state(copied))
    log.info(
        "%s is a plain detector: HPR begins as it. The interactions of the refiners %s begin anew; their other parts and "
        "their heads as the primary one's.",
        source,
        " and ".join(detector.refiner.branches),
    )


def _check_merge(weights: nnx.Variable, source: object) -> None:
    """Raises a UserError unless a merge begins with the primary path alone, and is learned."""
    values = np.asarray(weights.get_value())
    primary = np.zeros(values.shape[-1])
    primary[0] = 1.0
    if not isinstance(weights, nnx.Param):
        raise UserError(
            f"{source} is a plain detector, and fixed merges would never use other refiners; set config.model.refiner.merge "
            "to learned_vector."
        )
    if not np.array_equal(values, np.broadcast_to(primary, values.shape)):
        ones = ",".join(f"{value:g}" for value in primary)
        raise UserError(
            f"{source} is a plain detector, as which HPR begins only if its merges take the primary path alone; set "
            f"config.model.refiner.merge_initial to ({ones}) and merge_xavier to False, or take a variant from_plain_*."
        )
