"""Refiners that look at each query's region: the two of HPR, dynamic convolution and regional cross-attention (paper
section 3.2), and the fully connected layers of Faster R-CNN.

All read the `[B, Q, bins, C]` features that RoIAlign takes from the memory at each query's reference box.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.position import map_encoding
from hpr_jax.models.surroundings import Surroundings


class DynamicConv(nnx.Module):
    """Each query generates two 1x1 kernels for its own region (Sparse R-CNN, Sun et al. 2021, section 3.2)."""

    needs_regions = True

    def __init__(self, channels: int, hidden: int, region_size: int, *, rngs: nnx.Rngs):
        self.generator = xavier_linear(channels, 2 * channels * hidden, rngs=rngs)
        self.norm1 = layer_norm(hidden, rngs=rngs)
        self.norm2 = layer_norm(channels, rngs=rngs)
        self.project = xavier_linear(region_size**2 * channels, channels, rngs=rngs)
        self.norm3 = layer_norm(channels, rngs=rngs)
        self.hidden = hidden

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """`[B, Q, C]` -> `[B, Q, C]`, the residual included."""
        batch, queries, channels = query.shape
        half = channels * self.hidden
        # Two products instead of one that is split: their gradients need not be joined.
        squeeze = self.generator(query, slice(half)).reshape(batch, queries, channels, self.hidden)
        expand = self.generator(query, slice(half, None)).reshape(batch, queries, self.hidden, channels)
        x = jax.nn.relu(self.norm1(surroundings.regions @ squeeze))
        x = jax.nn.relu(self.norm2(x @ expand))
        x = jax.nn.relu(self.norm3(self.project(x.reshape(batch, queries, -1))))
        return query + x


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
        batch, queries, channels = query.shape
        size = self.region_size
        regions = surroundings.regions.reshape(batch * queries, size * size, channels)
        spawned = self.spawn(query).reshape(batch * queries, self.samples, channels)
        whole = jnp.full((1, 2), size)
        encoding = map_encoding(whole, size, size, channels, temperature=self.temperature)
        attention = self.attention
        # The encoding is the same for all regions: project it once instead of adding it to every region.
        encoded = (encoding.reshape(1, -1, channels) @ attention.key_kernel).astype(query.dtype)
        key = attention.project(regions, slice(1, 2)) + encoded
        x = attention.attend(attention.project(spawned, slice(0, 1)), key, attention.project(regions, slice(2, 3)))
        x = jax.nn.relu(self.norm(self.project(x.reshape(batch, queries, -1))))
        return query + x


class RegionFC(nnx.Module):
    """Two fully connected layers on the region, which take the place of the query (Faster R-CNN, Ren et al. 2015)."""

    needs_regions = True

    def __init__(self, channels: int, hidden: int, region_size: int, *, rngs: nnx.Rngs):
        self.expand = xavier_linear(region_size**2 * channels, hidden, rngs=rngs)
        self.contract = xavier_linear(hidden, channels, rngs=rngs)

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """`[B, Q, C]` -> `[B, Q, C]`; of the query nothing is kept."""
        regions = surroundings.regions.reshape(*query.shape[:2], -1)
        return jax.nn.relu(self.contract(jax.nn.relu(self.expand(regions))))
