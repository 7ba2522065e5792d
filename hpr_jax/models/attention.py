"""Attention layers: multi-head attention and multi-scale deformable attention."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.layers import Linear
from hpr_jax.ops.attention import attention
from hpr_jax.ops.deformable_sampling import deformable_sampling


class MultiHeadAttention(nnx.Module):
    """Multi-head attention without residual; its three input projections are one kernel `[C, 3 C]` (query, key, value)."""

    def __init__(self, channels: int, heads: int, *, rngs: nnx.Rngs):
        if channels % heads:
            raise UserError(f"MultiHeadAttention: {channels} channels do not divide into {heads} heads.")
        zeros, xavier = nnx.initializers.zeros, nnx.initializers.xavier_uniform()
        self.input = Linear(channels, 3 * channels, rngs=rngs, kernel_init=xavier, bias_init=zeros)
        self.output = Linear(channels, channels, rngs=rngs, kernel_init=xavier, bias_init=zeros)
        self.heads = heads

    def project(self, x: jax.Array, part: slice) -> jax.Array:
        """Some of the input projections (0 query, 1 key, 2 value) of x `[..., C]` -> `[..., parts * C]`."""
        channels = x.shape[-1]
        return self.input(x, slice(part.start * channels, part.stop * channels))

    @property
    def key_kernel(self) -> jax.Array:
        """The key projection's kernel, `[C, C]`."""
        channels = self.input.kernel.shape[0]
        return self.input.kernel[:, channels : 2 * channels]

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Projected query `[B, Q, C]`, key and value `[B, K, C]`, mask bool `[B, Q, K]` (true: may see) -> `[B, Q, C]`."""

        def split(x):
            return x.reshape(*x.shape[:-1], self.heads, -1)

        return self.output(attention(split(query), split(key), split(value), mask).reshape(query.shape))

    def self_attention(self, x: jax.Array, position: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Self-attention of x `[B, Q, C]`; `position` `[B, Q, C]` is added to queries and keys, not to values."""
        query, key = jnp.split(self.project(x + position, slice(0, 2)), 2, axis=-1)
        return self.attend(query, key, self.project(x, slice(2, 3)), mask)


class DeformableAttention(nnx.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, section 4.1) with its residual.

    Args:
      implementation: of `deformable_sampling`.
    """

    def __init__(
        self, channels: int, heads: int, levels: int, points: int, *, implementation: str | None = None, rngs: nnx.Rngs
    ):
        if channels % heads:
            raise UserError(f"DeformableAttention: {channels} channels do not divide into {heads} heads.")
        zeros = nnx.initializers.zeros
        xavier = nnx.initializers.xavier_uniform()
        samples = heads * levels * points
        self.offsets = Linear(channels, samples * 2, rngs=rngs, kernel_init=zeros, bias_init=_compass(heads, levels, points))
        self.weights = Linear(channels, samples, rngs=rngs, kernel_init=zeros, bias_init=zeros)
        self.value = Linear(channels, channels, rngs=rngs, kernel_init=xavier, bias_init=zeros)
        self.output = Linear(channels, channels, rngs=rngs, kernel_init=xavier, bias_init=zeros)
        self.heads, self.levels, self.points = heads, levels, points
        self.implementation = implementation

    def __call__(
        self,
        query: jax.Array,
        position: jax.Array,
        memory: jax.Array,
        memory_valid: jax.Array,
        spatial_shapes: Sequence[tuple[int, int]],
        level_sizes: jax.Array,
        reference: jax.Array,
    ) -> jax.Array:
        """Samples `memory` around each query's reference.

        Args:
          query, position: `[B, Q, C]`.
          memory: `[B, S, C]`; memory_valid: bool `[B, S]`, false where padded.
          spatial_shapes: static (height, width) of each level.
          level_sizes: int32 `[B, L, 2]`, valid (height, width) of each level.
          reference: points `[B, Q, 2]` or cxcywh boxes `[B, Q, 4]`, normalised to the valid area.

        Returns:
          `[B, Q, C]`, the residual included.
        """
        batch, queries, _ = query.shape
        shape = (batch, queries, self.heads, self.levels, self.points)
        # Masked behind the projection, or its bias would leak in.
        value = jnp.where(memory_valid[..., None], self.value(memory), 0)
        value = value.reshape(batch, -1, self.heads, value.shape[-1] // self.heads)

        positioned = query + position
        offsets = self.offsets(positioned).reshape(*shape, 2).astype(jnp.float32)
        weights = self.weights(positioned).reshape(batch, queries, self.heads, -1)
        weights = jax.nn.softmax(weights.astype(jnp.float32), axis=-1).reshape(shape)

        extent = level_sizes[:, None, None, :, None, ::-1].astype(jnp.float32)
        reference = reference[:, :, None, None, None, :].astype(jnp.float32)
        if reference.shape[-1] == 4:
            # Offsets count in half box sides, P of them.
            offsets = offsets / self.points * reference[..., 2:] * 0.5 * extent
        pixels = reference[..., :2] * extent + offsets
        locations = pixels / jnp.array([(w, h) for h, w in spatial_shapes], jnp.float32)[:, None]
        sampled = deformable_sampling(value, spatial_shapes, locations, weights, implementation=self.implementation)
        return query + self.output(sampled)


def _compass(heads: int, levels: int, points: int) -> nnx.Initializer:
    """Initial offsets: each head looks in one direction, its points 1, 2, ... pixels away."""

    def init(_key, shape, dtype=jnp.float32):
        theta = jnp.arange(heads) * (2 * jnp.pi / heads)
        direction = jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
        direction /= jnp.max(jnp.abs(direction), axis=-1, keepdims=True)
        distance = jnp.arange(1, points + 1)
        grid = direction[:, None, None, :] * distance[:, None]
        return jnp.broadcast_to(grid, (heads, levels, points, 2)).reshape(shape).astype(dtype)

    return init
