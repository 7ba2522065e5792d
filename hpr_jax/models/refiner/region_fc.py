"""The refiner `region_fc`: the fully connected layers of Faster R-CNN on each query's region."""

import jax
from flax import nnx

from hpr_jax.models.layers import xavier_linear
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings


class RegionFC(nnx.Module):
    """Two fully connected layers on the region, whose result replaces the query (Faster R-CNN, Ren et al. 2015).

    Args:
      hidden: number of channels between the two layers.
    """

    needs_regions = True

    def __init__(self, shared: SharedSettings, *, hidden: int, rngs: nnx.Rngs):
        self.expand = xavier_linear(shared.region_size**2 * shared.channels, hidden, rngs=rngs)
        self.contract = xavier_linear(hidden, shared.channels, rngs=rngs)

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """Queries `[B, Q, C]` -> `[B, Q, C]`. There is no residual: of the query only the shape is read."""
        assert surroundings.regions is not None, "regions are taken where an interaction needs them"
        regions = surroundings.regions.reshape(*query.shape[:2], -1)
        return jax.nn.relu(self.contract(jax.nn.relu(self.expand(regions))))
