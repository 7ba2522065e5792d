"""The fully connected layers of Faster R-CNN on each query's region."""

import jax
from flax import nnx

from hpr_jax.models.layers import xavier_linear
from hpr_jax.models.refiner.interaction import Surroundings


class RegionFC(nnx.Module):
    """Two fully connected layers on the region, which take the place of the query (Faster R-CNN, Ren et al. 2015)."""

    needs_regions = True

    def __init__(self, channels: int, hidden: int, region_size: int, *, rngs: nnx.Rngs):
        self.expand = xavier_linear(region_size**2 * channels, hidden, rngs=rngs)
        self.contract = xavier_linear(hidden, channels, rngs=rngs)

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """`[B, Q, C]` -> `[B, Q, C]`; of the query nothing is kept."""
        regions = surroundings.regions.reshape(*query.shape[:2], -1)
        return jax.nn.relu(self.contract(jax.nn.relu(self.expand(regions))))
