"""Refiners that look at each query's region: the two of HPR, dynamic convolution and regional cross-attention (paper
section 3.2), and the fully connected layers of Faster R-CNN.

All read the `[B, Q, bins, C]` features that RoIAlign takes from the memory at each query's reference box.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.layers import kept, layer_norm, xavier_linear
from hpr_jax.models.position import map_encoding
from hpr_jax.models.refiner.interaction import CHUNK, Surroundings, flat
from hpr_jax.ops.chunks import by_chunks


class RegionalAttention(nnx.Module):
    """Each query spawns `samples` queries that attend to the pixels of its own region."""

    needs_regions = True

    def __init__(self, channels: int, heads: int, samples: int, region_size: int, *, temperature: float, rngs: nnx.Rngs):
        self.spawn = xavier_linear(channels, samples * channels, rngs=rngs)
        self.attention = MultiHeadAttention(channels, heads, rngs=rngs)
        self.project = xavier_linear(samples * channels, channels, rngs=rngs)
        self.norm = layer_norm(channels, rngs=rngs)
        self.samples, self.region_size, self.temperature = samples, region_size, temperature

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """`[B, Q, C]` -> `[B, Q, C]`, the residual included."""
        channels, size = query.shape[-1], self.region_size
        whole = jnp.full((1, 2), size)
        encoding = map_encoding(whole, size, size, channels, temperature=self.temperature)
        attention = self.attention
        # The encoding is the same for all regions: project it once instead of adding it to every region.
        encoded = (encoding.reshape(1, -1, channels) @ attention.key_kernel).astype(query.dtype)

        def of_chunk(rows):
            query, regions = rows
            spawned = self.spawn(query).reshape(-1, self.samples, channels)
            key = attention.project(regions, slice(1, 2)) + encoded
            x = attention.attend(attention.project(spawned, slice(0, 1)), key, attention.project(regions, slice(2, 3)))
            return self.project(x.reshape(len(query), -1))

        x = kept(by_chunks(of_chunk, CHUNK, flat(query, surroundings))).reshape(query.shape)
        return query + jax.nn.relu(self.norm(x))
