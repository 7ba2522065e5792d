"""The refiner `regional_attention`: each query attends to the pixels of its own region."""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.position import map_encoding
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings, map_regions


class RegionalAttention(nnx.Module):
    """Regional cross-attention: each query spawns several, which attend to the query's region (HPR section 3.2).

    Args:
      samples: how many queries each query spawns.
      temperature: of the encodings of positions within a region, see `map_encoding`.
    """

    needs_regions = True

    def __init__(self, shared: SharedSettings, *, heads: int, samples: int, temperature: float, rngs: nnx.Rngs):
        channels = shared.channels
        self.spawn = xavier_linear(channels, samples * channels, rngs=rngs)
        self.attention = MultiHeadAttention(channels, heads, implementation=shared.implementation, rngs=rngs)
        self.project = xavier_linear(samples * channels, channels, rngs=rngs)
        self.norm = layer_norm(channels, rngs=rngs)
        self.samples, self.region_size, self.temperature = samples, shared.region_size, temperature

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """Queries `[B, Q, C]` -> `[B, Q, C]`, the residual included; `position` is not read."""
        channels, size = query.shape[-1], self.region_size
        encoding = map_encoding(jnp.full((1, 2), size), size, size, channels, temperature=self.temperature)
        attention = self.attention
        # The encoding is the same for all regions: it is projected once, instead of being added to every region.
        encoded = (encoding.reshape(1, -1, channels) @ attention.key_kernel).astype(query.dtype)
        bins = encoded.shape[1]

        def attended(query, regions):
            spawned = jax.named_scope("spawn")(self.spawn)(query).reshape(-1, self.samples, channels)
            with jax.named_scope("attention"):
                more = regions.shape[1] - bins
                mask = (jnp.arange(bins + more) < bins)[None, None] if more else None
                key = attention.project(regions, slice(1, 2)) + jnp.pad(encoded, ((0, 0), (0, more), (0, 0)))
                value = attention.project(regions, slice(2, 3))
                x = attention.attend(attention.project(spawned, slice(0, 1)), key, value, mask)
            return jax.named_scope("project")(self.project)(x.reshape(query.shape[0], -1))

        return query + jax.nn.relu(jax.named_scope("norm")(self.norm)(map_regions(attended, query, surroundings)))
