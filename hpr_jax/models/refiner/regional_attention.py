"""Refiners that look at each query's region: the two of HPR, dynamic convolution and regional cross-attention (paper
section 3.2), and the fully connected layers of Faster R-CNN.

All read the `[B, Q, bins, C]` features that RoIAlign takes from the memory at each query's reference box.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.layers import affine, kept, layer_norm, xavier_linear
from hpr_jax.models.position import map_encoding
from hpr_jax.models.refiner.interaction import Surroundings
from hpr_jax.ops.chunks import by_chunks

# Whose regions are looked at at once: they, and the kernels generated for them, stay in a CPU's caches.
QUERIES = 128


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
        channels = query.shape[-1]
        half = channels * self.hidden
        kernel, bias = self.generator.kernel[...], self.generator.bias[...]
        # Two products instead of one that is split: their gradients need not be joined.
        to_squeeze, to_expand = (kernel[:, :half], bias[:half]), (kernel[:, half:], bias[half:])

        def of_chunk(rows):
            query, regions = rows
            squeeze = affine(query, *to_squeeze).reshape(-1, channels, self.hidden)
            expand = affine(query, *to_expand).reshape(-1, self.hidden, channels)
            x = jax.nn.relu(self.norm1(regions @ squeeze))
            x = jax.nn.relu(self.norm2(x @ expand))
            return self.project(x.reshape(len(query), -1))

        x = kept(by_chunks(of_chunk, QUERIES, _flat(query, surroundings))).reshape(query.shape)
        return query + jax.nn.relu(self.norm3(x))


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

        x = kept(by_chunks(of_chunk, QUERIES, _flat(query, surroundings))).reshape(query.shape)
        return query + jax.nn.relu(self.norm(x))


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


def _flat(query: jax.Array, surroundings: Surroundings) -> tuple[jax.Array, jax.Array]:
    """Queries and their regions, image after image: `[B * Q, C]` and `[B * Q, bins, C]`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (query, surroundings.regions))
