"""Refiners that look at the memory as a whole or not at all: deformable attention, global cross-attention, and the object
feature alone (HPR section 3.2). Those that look at regions are in `region.py`."""

import jax
from flax import nnx

from hpr_jax.models.attention import DeformableAttention
from hpr_jax.models.refiner.interaction import Surroundings


class DeformableRefiner(nnx.Module):
    """Deformable attention around the reference boxes, the refiner of all base detectors."""

    needs_regions = False

    def __init__(
        self, channels: int, heads: int, levels: int, points: int, *, implementation: str | None = None, rngs: nnx.Rngs
    ):
        self.attention = DeformableAttention(channels, heads, levels, points, implementation=implementation, rngs=rngs)

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        memory = surroundings.memory
        return self.attention(
            query,
            position,
            memory.tokens,
            memory.valid,
            memory.spatial_shapes,
            memory.level_sizes,
            surroundings.reference_boxes,
        )
