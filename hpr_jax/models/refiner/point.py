"""The refiner `point`: the query alone, without another look at the image."""

import jax
from flax import nnx

from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings


class PointInteraction(nnx.Module):
    """One linear layer on the query; what surrounds it is not read (HPR table 5)."""

    needs_regions = False

    def __init__(self, shared: SharedSettings, *, rngs: nnx.Rngs):
        self.project = xavier_linear(shared.channels, shared.channels, rngs=rngs)
        self.norm = layer_norm(shared.channels, rngs=rngs)

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """Queries `[B, Q, C]` -> `[B, Q, C]`, the residual included."""
        return query + jax.nn.relu(self.norm(self.project(query)))
