"""Deformable transformer encoder over the flattened feature pyramid (Zhu et al. 2021, section 4.1)."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.attention import DeformableAttention
from hpr_jax.models.layers import FeedForward, layer_norm, rematerialized, stack
from hpr_jax.models.position import map_encoding
from hpr_jax.ops.padding import valid_mask


@flax.struct.dataclass
class Pyramid:
    """A feature pyramid flattened row by row, level after level.

    Attributes:
      tokens: `[B, S, C]`.
      valid: bool `[B, S]`, false where padded.
      level_sizes: int32 `[B, L, 2]`, valid (height, width) of each level.
      image_sizes: int32 `[B, 2]`, valid (height, width) of each image in pixels.
      spatial_shapes: static (height, width) of each level.
    """

    tokens: jax.Array
    valid: jax.Array
    level_sizes: jax.Array
    image_sizes: jax.Array
    spatial_shapes: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)


def flatten(features: Sequence[jax.Array], sizes: Sequence[jax.Array], image_sizes: jax.Array) -> Pyramid:
    """Maps `[B, h, w, C]` with their valid sizes `[B, 2]` -> `Pyramid`."""
    batch, channels = features[0].shape[0], features[0].shape[-1]
    shapes = tuple(map_.shape[1:3] for map_ in features)
    valid = [valid_mask(size, h, w).reshape(batch, h * w) for size, (h, w) in zip(sizes, shapes)]
    return Pyramid(
        tokens=jnp.concatenate([map_.reshape(batch, -1, channels) for map_ in features], axis=1),
        valid=jnp.concatenate(valid, axis=1),
        level_sizes=jnp.stack(sizes, axis=1),
        image_sizes=image_sizes,
        spatial_shapes=shapes,
    )


def pixel_centers(pyramid: Pyramid) -> jax.Array:
    """Each token's pixel centre (x, y), normalised to its level's valid area: `[B, S, 2]`."""
    centers = []
    for level, (height, width) in enumerate(pyramid.spatial_shapes):
        size = pyramid.level_sizes[:, level].astype(jnp.float32)
        y = (jnp.arange(height) + 0.5) / size[:, :1]
        x = (jnp.arange(width) + 0.5) / size[:, 1:]
        grid = jnp.stack(jnp.broadcast_arrays(x[:, None, :], y[:, :, None]), axis=-1)
        centers.append(grid.reshape(len(size), height * width, 2))
    return jnp.concatenate(centers, axis=1)


class EncoderLayer(nnx.Module):
    """Deformable self-attention and FFN, each followed by its norm."""

    def __init__(
        self, channels: int, heads: int, levels: int, points: int, hidden: int, *, implementation: str | None, rngs: nnx.Rngs
    ):
        self.attention = DeformableAttention(channels, heads, levels, points, implementation=implementation, rngs=rngs)
        self.norm1 = layer_norm(channels, rngs=rngs)
        self.ffn = FeedForward(channels, hidden, rngs=rngs)
        self.norm2 = layer_norm(channels, rngs=rngs)

    def __call__(self, pyramid: Pyramid, position: jax.Array, centers: jax.Array) -> Pyramid:
        x = self.attention(
            pyramid.tokens,
            position,
            pyramid.tokens,
            pyramid.valid,
            pyramid.spatial_shapes,
            pyramid.level_sizes,
            centers,
        )
        return pyramid.replace(tokens=self.norm2(self.ffn(self.norm1(x))))


class Encoder(nnx.Module):
    """Stack of encoder layers with learned level embeddings added to the sine positions.

    Args:
      remat: compute a layer's inner values again in the backward pass.
      implementation: of `deformable_sampling`.
    """

    def __init__(
        self,
        *,
        layers: int,
        channels: int,
        heads: int,
        levels: int,
        points: int,
        hidden: int,
        position_temperature: float,
        position_offset: float,
        remat: bool,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        def make_layer(rngs):
            return EncoderLayer(channels, heads, levels, points, hidden, implementation=implementation, rngs=rngs)

        self.layers = stack(make_layer, layers, rngs=rngs)
        self.level_embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (levels, channels)))
        self.position_temperature, self.position_offset, self.remat = position_temperature, position_offset, remat

    def __call__(self, pyramid: Pyramid) -> Pyramid:
        """Refines the tokens; the result's tokens are the memory. Padded tokens hold arbitrary finite values."""
        position = self._position(pyramid)
        centers = pixel_centers(pyramid)

        def step(pyramid, layer):
            return layer(pyramid, position, centers), None

        return jax.lax.scan(rematerialized(step) if self.remat else step, pyramid, self.layers)[0]

    def _position(self, pyramid: Pyramid) -> jax.Array:
        channels = pyramid.tokens.shape[-1]
        encodings = []
        for level, (height, width) in enumerate(pyramid.spatial_shapes):
            encoding = map_encoding(
                pyramid.level_sizes[:, level],
                height,
                width,
                channels,
                temperature=self.position_temperature,
                offset=self.position_offset,
            )
            encodings.append(encoding.reshape(len(encoding), -1, channels) + self.level_embedding[level])
        return jnp.concatenate(encodings, axis=1).astype(pyramid.tokens.dtype)
