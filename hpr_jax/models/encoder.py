"""Deformable transformer encoder over the flattened feature pyramid (Zhu et al. 2021, section 4.1)."""

import dataclasses

import jax
from flax import nnx

from hpr_jax.models.attention import DeformableAttention
from hpr_jax.models.layers import FeedForward, layer_norm, scan_layers, stack
from hpr_jax.models.position import map_encoding
from hpr_jax.models.pyramid import Pyramid, join_levels, pixel_centers


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
        """Refines the tokens once.

        Args:
          position: encodings of the tokens' positions, `[B, S, C]`.
          centers: where the tokens look, `[B, S, 2]`, see `pixel_centers`.
        """
        x = jax.named_scope("attention")(self.attention)(pyramid.tokens, position, pyramid, centers)
        x = jax.named_scope("norm1")(self.norm1)(x)
        x = jax.named_scope("ffn")(self.ffn)(x)
        return dataclasses.replace(pyramid, tokens=jax.named_scope("norm2")(self.norm2)(x))


class Encoder(nnx.Module):
    """A stack of encoder layers. The positions of tokens are sine encodings plus a learned embedding of the level.

    Args:
      layers: number of layers.
      hidden: number of channels inside the FFNs.
      position_temperature, position_offset: of the sine encodings, see `map_encoding`.
      remat: whether the backward pass computes a layer's inner values again.
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
        """Refines the tokens; the result is the memory. Its padded tokens hold arbitrary finite values."""
        position = self._position(pyramid)
        centers = pixel_centers(pyramid)

        def step(pyramid, shared, layer):
            return jax.named_scope("layers")(layer)(pyramid, *shared), None

        return scan_layers(step, pyramid, (position, centers), self.layers, remat=self.remat)[0]

    def _position(self, pyramid: Pyramid) -> jax.Array:
        """Encodings of the tokens' positions, `[B, S, C]`."""
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
            encodings.append(encoding.reshape(encoding.shape[0], -1, channels) + self.level_embedding[level])
        return join_levels(encodings).astype(pyramid.tokens.dtype)
