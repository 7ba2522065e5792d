"""Global cross-attention as a refiner."""

import jax
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.position import map_encoding
from hpr_jax.models.refiner.interaction import Surroundings


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
