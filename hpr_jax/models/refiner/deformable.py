"""Refiners that look at the memory as a whole or not at all: deformable attention, global cross-attention, and the object
feature alone (HPR section 3.2). Those that look at regions are in `region.py`."""

from collections.abc import Callable
from typing import Protocol

import jax
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.attention import DeformableAttention, MultiHeadAttention
from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.position import map_encoding
from hpr_jax.models.refiner.interaction import Surroundings


class Interaction(Protocol):
    """How a refiner looks at the image: queries and their positions `[B, Q, C]` -> `[B, Q, C]`, residual included."""

    needs_regions: bool

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array: ...


InteractionFactory = Callable[[nnx.Rngs], Interaction]


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


class GlobalAttention(nnx.Module):
    """Cross-attention to all tokens of one level, as in the first DETR (Carion et al. 2020)."""

    needs_regions = False

    def __init__(self, channels: int, heads: int, level: int, levels: int, *, temperature: float, rngs: nnx.Rngs):
        if not 0 <= level < levels:
            raise UserError(
                f"config.model.refiner.global_attention.level is {level}; the pyramid has the levels 0 to {levels - 1}."
            )
        self.attention = MultiHeadAttention(channels, heads, rngs=rngs)
        self.level, self.temperature = level, temperature

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """`[B, Q, C]` -> `[B, Q, C]`, the residual included."""
        memory, level = surroundings.memory, self.level
        height, width = memory.spatial_shapes[level]
        start = sum(h * w for h, w in memory.spatial_shapes[:level])
        place = slice(start, start + height * width)
        tokens, valid = memory.tokens[:, place], memory.valid[:, place]
        batch, count, channels = tokens.shape
        encoding = map_encoding(memory.level_sizes[:, level], height, width, channels, temperature=self.temperature)
        attention = self.attention
        return query + attention.attend(
            attention.project(query + position, slice(0, 1)),
            attention.project(tokens + encoding.reshape(batch, count, channels).astype(tokens.dtype), slice(1, 2)),
            attention.project(tokens, slice(2, 3)),
            valid[:, None, :],
        )


class PointRefiner(nnx.Module):
    """The object feature refined by one linear layer, without another look at the image."""

    needs_regions = False

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.project = xavier_linear(channels, channels, rngs=rngs)
        self.norm = layer_norm(channels, rngs=rngs)

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """`[B, Q, C]` -> `[B, Q, C]`, the residual included."""
        return query + jax.nn.relu(self.norm(self.project(query)))
