"""The merge of a layer's paths: a weighted sum of their features (HPR section 3.1, equation 4)."""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.layers import Frozen

# How the paths are weighted in a merge.
MergeKind = Literal["fixed", "learned_scalar", "learned_vector"]
MERGES = get_args(MergeKind)

# The parts of a path behind which the paths may be merged.
MergePoint = Literal["attention", "interaction", "ffn"]
MERGE_POINTS = get_args(MergePoint)


class Merge(nnx.Module):
    """Weighted sum of the paths (HPR equation 4).

    Args:
      kind: `fixed` weights, a learned weight per path, or a learned weight per channel and path.
      initial: a weight per path, the primary one first; empty: 1 for every path. For `learned_vector` also `"xavier"`:
        weights drawn at random as in the published DDQ models, whose Xavier initialisation overwrites the weights (+-0.15 at
        256 channels).

    Raises:
      UserError: an unknown kind, or weights of another number than the paths.
    """

    def __init__(
        self,
        paths: int,
        channels: int,
        kind: MergeKind,
        initial: Sequence[float] | Literal["xavier"],
        *,
        rngs: nnx.Rngs,
    ):
        if kind not in MERGES:
            raise UserError(f"merge is {kind!r}; known are {', '.join(MERGES)}.")
        self.weights = (Frozen if kind == "fixed" else nnx.Param)(_initial_weights(paths, channels, kind, initial, rngs))

    def __call__(self, paths: Sequence[jax.Array]) -> jax.Array:
        """Results of the paths, `[..., C]` each -> `[..., C]`."""
        weighted = [path * self.weights[..., index].astype(path.dtype) for index, path in enumerate(paths)]
        return functools.reduce(jnp.add, weighted)


def _initial_weights(
    paths: int, channels: int, kind: MergeKind, initial: Sequence[float] | Literal["xavier"], rngs: nnx.Rngs
) -> jax.Array:
    """`[channels, paths]` for vectors, else `[paths]`."""
    if initial == "xavier":
        return nnx.initializers.xavier_uniform()(rngs.params(), (channels, paths))
    initial = initial or (1.0,) * paths
    if len(initial) != paths:
        raise UserError(f"merge_initial has {len(initial)} weights for {paths} refiners; give one for each, or none.")
    weights = jnp.array(initial, jnp.float32)
    return jnp.tile(weights, (channels, 1)) if kind == "learned_vector" else weights
