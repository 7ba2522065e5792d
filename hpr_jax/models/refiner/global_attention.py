"""The refiner `global_attention`: cross-attention to all tokens of one level."""

import jax
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.position import map_encoding
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings


class GlobalAttention(nnx.Module):
    """Cross-attention to all tokens of one level, as in the first DETR (Carion et al. 2020).

    Args:
      level: index of the level, from the finest (0) on.
      temperature: of the tokens' position encodings, see `map_encoding`.

    Raises:
      UserError: there is no such level.
    """

    needs_regions = False

    def __init__(self, shared: SharedSettings, *, heads: int, level: int, temperature: float, rngs: nnx.Rngs):
        if not 0 <= level < shared.levels:
            raise UserError(f"level is {level}; choose one of the pyramid's levels, 0 to {shared.levels - 1}.")
        self.attention = MultiHeadAttention(shared.channels, heads, implementation=shared.implementation, rngs=rngs)
        self.level, self.temperature = level, temperature

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """Queries and position encodings `[B, Q, C]` -> `[B, Q, C]`, the residual included."""
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
