"""Dynamic convolution on each query's region."""

import jax
from flax import nnx

from hpr_jax.models.layers import kept, layer_norm, xavier_linear
from hpr_jax.models.refiner.interaction import CHUNK, Surroundings, flat
from hpr_jax.ops.chunks import by_chunks
from hpr_jax.ops.linear import affine


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

        x = kept(by_chunks(of_chunk, CHUNK, flat(query, surroundings))).reshape(query.shape)
        return query + jax.nn.relu(self.norm3(x))
