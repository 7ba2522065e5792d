"""The refiner `deformable`: deformable attention around the reference boxes."""

import jax
from flax import nnx

from hpr_jax.models.attention import DeformableAttention
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings


class DeformableInteraction(nnx.Module):
    """Multi-scale deformable attention to the memory, the interaction of all base detectors (HPR section 3.2)."""

    needs_regions = False

    def __init__(self, shared: SharedSettings, *, rngs: nnx.Rngs):
        self.attention = DeformableAttention(
            shared.channels,
            shared.heads,
            shared.levels,
            shared.points,
            implementation=shared.implementation,
            rngs=rngs,
        )

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """Queries and position encodings `[B, Q, C]` -> `[B, Q, C]`, the residual included."""
        return self.attention(query, position, surroundings.memory, surroundings.reference_boxes)
