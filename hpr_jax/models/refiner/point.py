"""The object feature alone as a refiner."""

import jax
from flax import nnx

from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.refiner.interaction import Surroundings


class PointRefiner(nnx.Module):
    """The object feature refined by one linear layer, without another look at the image."""

    needs_regions = False

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.project = xavier_linear(channels, channels, rngs=rngs)
        self.norm = layer_norm(channels, rngs=rngs)

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """`[B, Q, C]` -> `[B, Q, C]`, the residual included."""
        return query + jax.nn.relu(self.norm(self.project(query)))
