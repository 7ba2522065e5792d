"""Attention layers: multi-head attention and multi-scale deformable attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.layers import Linear
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.ops.attention import attention
from hpr_jax.ops.deformable_sampling import deformable_sampling


class MultiHeadAttention(nnx.Module):
    """Multi-head attention without a residual. Its three input projections (query, key, value) are one kernel `[C, 3 * C]`.

    Args:
      implementation: of `attention`.

    Raises:
      UserError: the channels do not divide into so many heads.
    """

    def __init__(self, channels: int, heads: int, *, implementation: str | None = None, rngs: nnx.Rngs):
        if channels % heads:
            raise UserError(f"{channels} channels do not divide into {heads} heads; choose another number of heads.")
        zeros, xavier = nnx.initializers.zeros, nnx.initializers.xavier_uniform()
        self.input = Linear(channels, 3 * channels, rngs=rngs, kernel_init=xavier, bias_init=zeros)
        self.output = Linear(channels, channels, rngs=rngs, kernel_init=xavier, bias_init=zeros)
        self.heads, self.implementation = heads, implementation

    def project(self, x: jax.Array, part: slice) -> jax.Array:
        """The input projections `part` (of 0 query, 1 key, 2 value) of x `[..., C]`, side by side: `[..., parts * C]`."""
        channels = x.shape[-1]
        return jax.named_scope("input")(self.input)(x, slice(part.start * channels, part.stop * channels))

    @property
    def key_kernel(self) -> jax.Array:
        """The kernel of the key projection, `[C, C]`."""
        channels = self.input.kernel.shape[0]
        return self.input.kernel[:, channels : 2 * channels]

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Attention of projected queries to projected keys and values, and the output projection.

        Args:
          query: `[B, Q, C]`.
          key, value: `[B, K, C]`.
          mask: bool `[B, Q, K]`, true: may see; None: all see all.

        Returns:
          `[B, Q, C]`.
        """

        def split(x):
            return x.reshape(*x.shape[:-1], self.heads, -1)

        attended = attention(split(query), split(key), split(value), mask, implementation=self.implementation)
        return jax.named_scope("output")(self.output)(attended.reshape(query.shape))

    def self_attention(self, x: jax.Array, position: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Self-attention of x.

        Args:
          x: `[B, Q, C]`.
          position: `[B, Q, C]`, added to x for queries and keys, not for values.
          mask: bool `[B, Q, Q]`, true: may see; None: all see all.

        Returns:
          `[B, Q, C]`.
        """
        query, key = jnp.split(self.project(x + position, slice(0, 2)), 2, axis=-1)
        return self.attend(query, key, self.project(x, slice(2, 3)), mask)


class DeformableAttention(nnx.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, section 4.1) with its residual.

    Args:
      levels: number of levels of the pyramid.
      points: number of sampling points per query, head and level.
      implementation: of `deformable_sampling`.

    Raises:
      UserError: the channels do not divide into so many heads.
    """

    def __init__(
        self, channels: int, heads: int, levels: int, points: int, *, implementation: str | None = None, rngs: nnx.Rngs
    ):
        if channels % heads:
            raise UserError(f"{channels} channels do not divide into {heads} heads; choose another number of heads.")
        zeros = nnx.initializers.zeros
        xavier = nnx.initializers.xavier_uniform()
        samples = heads * levels * points
        self.offsets = Linear(channels, samples * 2, rngs=rngs, kernel_init=zeros, bias_init=_compass(heads, levels, points))
        self.weights = Linear(channels, samples, rngs=rngs, kernel_init=zeros, bias_init=zeros)
        self.value = Linear(channels, channels, rngs=rngs, kernel_init=xavier, bias_init=zeros)
        self.output = Linear(channels, channels, rngs=rngs, kernel_init=xavier, bias_init=zeros)
        self.heads, self.levels, self.points = heads, levels, points
        self.implementation = implementation

    def __call__(self, query: jax.Array, position: jax.Array, memory: Pyramid, reference: jax.Array) -> jax.Array:
        """Samples the memory around the reference of each query.

        Args:
          query, position: queries and the encodings of their positions, `[B, Q, C]`.
          memory: what is sampled.
          reference: points `[B, Q, 2]` or cxcywh boxes `[B, Q, 4]`, normalised to the valid area.

        Returns:
          `[B, Q, C]`, the residual included.
        """
        # Padded tokens are zeroed behind the projection, since they would get its bias.
        value = jnp.where(memory.valid[..., None], jax.named_scope("value")(self.value)(memory.tokens), 0)
        value = value.reshape(query.shape[0], -1, self.heads, value.shape[-1] // self.heads)
        pixels, weights = self.samples(query, position, memory, reference)
        locations = pixels / jnp.array([(w, h) for h, w in memory.spatial_shapes], jnp.float32)[:, None]
        sampled = deformable_sampling(value, memory.spatial_shapes, locations, weights, implementation=self.implementation)
        return query + jax.named_scope("output")(self.output)(sampled)

    def samples(
        self, query: jax.Array, position: jax.Array, memory: Pyramid, reference: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Where the queries sample the memory; the arguments are those of a call.

        Returns:
          Points (x, y) in pixels of each level, `[B, Q, heads, levels, points, 2]`, and their weights, which sum to 1 in
          each head, `[B, Q, heads, levels, points]`.
        """
        batch, queries, _ = query.shape
        shape = (batch, queries, self.heads, self.levels, self.points)
        positioned = query + position
        offsets = jax.named_scope("offsets")(self.offsets)(positioned).reshape(*shape, 2).astype(jnp.float32)
        weights = jax.named_scope("weights")(self.weights)(positioned).reshape(batch, queries, self.heads, -1)
        weights = jax.nn.softmax(weights.astype(jnp.float32), axis=-1).reshape(shape)

        extent = memory.level_sizes[:, None, None, :, None, ::-1].astype(jnp.float32)
        reference = reference[:, :, None, None, None, :].astype(jnp.float32)
        if reference.shape[-1] == 4:
            # Around a box, an offset of P is half the side of the box; around a point, offsets are pixels.
            offsets = offsets / self.points * reference[..., 2:] * 0.5 * extent
        return reference[..., :2] * extent + offsets, weights


def _compass(heads: int, levels: int, points: int) -> nnx.Initializer:
    """Initialiser of the offsets: each head looks in a direction of its own, and its points are 1, 2, ... pixels away."""

    def init(_key, shape, dtype=jnp.float32):
        theta = jnp.arange(heads) * (2 * jnp.pi / heads)
        direction = jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
        direction /= jnp.max(jnp.abs(direction), axis=-1, keepdims=True)
        distance = jnp.arange(1, points + 1)
        grid = direction[:, None, None, :] * distance[:, None]
        return jnp.broadcast_to(grid, (heads, levels, points, 2)).reshape(shape).astype(dtype)

    return init
