"""Swin Transformer (Liu et al. 2021), padding-invariant.

The official network pads each map with zeros to whole windows, behind the norm, and lets these zeros take part in the
attention. Here each image of a batch has these zeros around its own valid area, as if it were alone; nothing sees what
lies beyond them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.layers import Linear, freeze, layer_norm, stack, uniform
from hpr_jax.ops.padding import halve, valid_mask, zero_padding

# The stride of the patch embedding.
PATCH = 4


def _linear(inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> Linear:
    """Linear layer as the official Swin initialises it."""
    return Linear(inputs, outputs, use_bias=bias, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)


def _pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros at the bottom and right of `[B, h, w, C]` until both sides are multiples."""
    _, height, width, _ = x.shape
    return jnp.pad(x, ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)))


class PatchEmbedding(nnx.Module):
    """Linear embedding of 4x4 patches and a norm (section 3.1)."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        init = uniform((3 * PATCH**2) ** -0.5)
        self.kernel = nnx.Param(init(rngs.params(), (PATCH, PATCH, 3, channels)))
        self.bias = nnx.Param(init(rngs.params(), (channels,)))
        self.norm = layer_norm(channels, rngs=rngs)

    def __call__(self, images: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, H, W, 3]` and valid sizes `[B, 2]` -> `[B, ceil(H / 4), ceil(W / 4), C]` and its valid sizes."""
        x = _pad_to_multiple(zero_padding(images, sizes), PATCH)
        batch, height, width, _ = x.shape
        # Patches do not overlap, so the convolution is a matrix product.
        x = x.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, 3).swapaxes(2, 3)
        x = x.reshape(batch, height // PATCH, width // PATCH, -1)
        kernel = self.kernel.get_value().astype(x.dtype)
        x = x @ kernel.reshape(-1, kernel.shape[-1]) + self.bias.get_value().astype(x.dtype)
        return self.norm(x), -(-sizes // PATCH)


class PatchMerging(nnx.Module):
    """Joins 2x2 tokens into one of twice the channels (section 3.1).

    The norm and the reduction see the four tokens of each channel side by side: channel-major, as mmdet has it.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(4 * channels, rngs=rngs)
        self.reduction = _linear(4 * channels, 2 * channels, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, h, w, C]` and valid sizes `[B, 2]` -> `[B, ceil(h / 2), ceil(w / 2), 2 C]` and its valid sizes."""
        x = _pad_to_multiple(zero_padding(x, sizes), 2)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        return self.reduction(self.norm(x)), halve(sizes)


def relative_positions(window: int) -> np.ndarray:
    """Rows of the position table for each (query, key) of a window: `[window^2, window^2]` (section 3.2)."""
    row, column = np.divmod(np.arange(window**2), window)
    rows, columns = row[:, None] - row[None], column[:, None] - column[None]
    return (rows + window - 1) * (2 * window - 1) + columns + window - 1


def _to_windows(x: jax.Array, window: int, shift: int) -> jax.Array:
    """Map `[B, h, w, C]`, rolled up and left by `shift` -> `[B * windows, window^2, C]`."""
    batch, height, width, channels = x.shape
    if shift:
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
    x = x.reshape(batch, height // window, window, width // window, window, channels).swapaxes(2, 3)
    return x.reshape(-1, window**2, channels)


def _from_windows(x: jax.Array, height: int, width: int, window: int, shift: int) -> jax.Array:
    """The inverse of `_to_windows`."""
    channels = x.shape[-1]
    x = x.reshape(-1, height // window, width // window, window, window, channels).swapaxes(2, 3)
    x = x.reshape(-1, height, width, channels)
    return jnp.roll(x, (shift, shift), axis=(1, 2)) if shift else x


def window_regions(sizes: jax.Array, height: int, width: int, window: int, shift: int) -> jax.Array:
    """Numbers the tokens of each window: those of one number see each other.

    Args:
      sizes: int32 `[B, 2]`, valid (height, width) of the maps.
      height, width: of the map, before it is padded to whole windows.

    Returns:
      int32 `[B * windows, window^2]`.
    """
    height, width = height + -height % window, width + -width % window
    # Rolling brings the first rows and columns to the far side, where they are strangers. An image alone would have them
    # right behind its last whole window; here they may be further away, in the same arrangement.
    wrapped = 2 * (jnp.arange(height) < shift)[:, None] + (jnp.arange(width) < shift)[None]
    attended = valid_mask(-(-sizes // window) * window, height, width)
    # Tokens beyond see one another, so that no query is without keys.
    return _to_windows(jnp.where(attended, wrapped[..., None], -1), window, shift)[..., 0]


class WindowAttention(nnx.Module):
    """Multi-head self-attention within windows, with relative position bias (section 3.2)."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, *, rngs: nnx.Rngs):
        self.qkv = _linear(channels, 3 * channels, rngs=rngs)
        self.project = _linear(channels, channels, rngs=rngs)
        self.position_bias = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), ((2 * window - 1) ** 2, heads)))
        self.heads, self.window, self.shift = heads, window, shift

    def __call__(self, x: jax.Array, sizes: jax.Array, regions: jax.Array) -> jax.Array:
        """`[B, h, w, C]`, its valid sizes `[B, 2]`, `window_regions` of these -> `[B, h, w, C]`."""
        _, height, width, channels = x.shape
        # The padding's queries, keys and values are those of zeros, that is the bias. Adding it last saves projecting them.
        qkv = zero_padding(x @ self.qkv.kernel.get_value().astype(x.dtype), sizes)
        qkv = _pad_to_multiple(qkv, self.window) + self.qkv.bias.get_value().astype(x.dtype)
        padded_height, padded_width = qkv.shape[1:3]
        qkv = _to_windows(qkv, self.window, self.shift)
        query, key, value = (part.reshape(*part.shape[:2], self.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
        bias = self.position_bias.get_value()[relative_positions(self.window)].transpose(2, 0, 1)
        mask = regions[:, None, :, None] == regions[:, None, None, :]
        out = jax.nn.dot_product_attention(query, key, value, bias=bias[None], mask=mask)
        out = out.reshape(*qkv.shape[:2], channels)
        out = _from_windows(out, padded_height, padded_width, self.window, self.shift)[:, :height, :width]
        return self.project(out)


class GeluMLP(nnx.Module):
    """W2 gelu(W1 x)."""

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.expand = _linear(channels, hidden, rngs=rngs)
        self.contract = _linear(hidden, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.contract(jax.nn.gelu(self.expand(x), approximate=False))


def drop_path(branch: jax.Array, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Zeroes an image's residual branch `[B, ...]` with probability `rate`, else makes up for that; no keys, no drop."""
    if keys is None:
        return branch
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(keys)
    return branch * (keep / (1 - rate)).astype(branch.dtype).reshape(-1, *(1,) * (branch.ndim - 1))


def split_keys(keys: jax.Array | None, count: int) -> jax.Array | list[None]:
    """`[B]` -> `[count, B]`; an image's key is its own, so that its drops do not depend on the rest of the batch."""
    if keys is None:
        return [None] * count
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


class Block(nnx.Module):
    """Window attention and MLP, each behind a norm and with a residual (section 3.1, equation 3)."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, mlp_ratio: float, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(channels, rngs=rngs)
        self.attention = WindowAttention(channels, heads, window, shift, rngs=rngs)
        self.norm2 = layer_norm(channels, rngs=rngs)
        self.mlp = GeluMLP(channels, int(mlp_ratio * channels), rngs=rngs)

    def __call__(
        self, x: jax.Array, sizes: jax.Array, regions: jax.Array, rate: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        """`[B, h, w, C]` -> the same shape; `rate` and `keys` are those of `drop_path`."""
        keys = split_keys(keys, 2)
        x = x + drop_path(self.attention(self.norm1(x), sizes, regions), rate, keys[0])
        return x + drop_path(self.mlp(self.norm2(x)), rate, keys[1])


class BlockPair(nnx.Module):
    """A block with plain windows and one with windows shifted by half their side."""

    def __init__(self, channels: int, heads: int, window: int, mlp_ratio: float, *, rngs: nnx.Rngs):
        self.plain = Block(channels, heads, window, 0, mlp_ratio, rngs=rngs)
        self.shifted = Block(channels, heads, window, window // 2, mlp_ratio, rngs=rngs)


class Stage(nnx.Module):
    """Blocks of one resolution, as a stack of pairs, and the patch merging behind them (none in the last stage)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        *,
        window: int,
        mlp_ratio: float,
        merge: bool,
        remat: bool,
        rngs: nnx.Rngs,
    ):
        self.pairs = stack(lambda rngs: BlockPair(channels, heads, window, mlp_ratio, rngs=rngs), depth // 2, rngs=rngs)
        self.merge = nnx.data(PatchMerging(channels, rngs=rngs) if merge else None)
        self.window, self.remat = window, remat

    def __call__(self, x: jax.Array, sizes: jax.Array, rates: np.ndarray, keys: jax.Array | None) -> jax.Array:
        """The blocks alone: `[B, h, w, C]` -> the same shape; `rates` are the drop path rates, `[depth]`."""
        _, height, width, _ = x.shape
        plain = window_regions(sizes, height, width, self.window, 0)
        shifted = window_regions(sizes, height, width, self.window, self.window // 2)
        run = jax.checkpoint(Block.__call__) if self.remat else Block.__call__
        rates = jnp.asarray(rates, jnp.float32).reshape(-1, 2)

        def step(x, scanned):
            pair, rate, keys = scanned
            keys = split_keys(keys, 2)
            x = run(pair.plain, x, sizes, plain, rate[0], keys[0])
            return run(pair.shifted, x, sizes, shifted, rate[1], keys[1]), None

        keys = None if keys is None else split_keys(keys, len(rates))
        return jax.lax.scan(step, x, (self.pairs, rates, keys))[0]


class SwinTransformer(nnx.Module):
    """Swin Transformer whose stages (strides 4, 8, 16, 32) are the features, each behind a norm. Defaults are Swin-L's.

    Args:
      embed_channels: of the first stage, twice as many in each further one.
      depths: blocks per stage, even: windows are shifted in every other block.
      heads: per stage.
      window: side of the attention windows, in tokens.
      mlp_ratio: hidden channels of the MLPs per channel.
      drop_path: stochastic depth rate of the last block; rates rise linearly from zero in the first one.
      frozen_stages: -1 trains everything, 0 freezes the patch embedding, n also the first n stages with their norms.
      remat: computes each block again in the backward pass.

    Raises:
      UserError: settings that do not fit one another.
    """

    def __init__(
        self,
        *,
        embed_channels: int = 192,
        depths: Sequence[int] = (2, 2, 18, 2),
        heads: Sequence[int] = (6, 12, 24, 48),
        window: int = 12,
        mlp_ratio: float = 4,
        drop_path: float = 0.2,
        frozen_stages: int = -1,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        channels = [embed_channels * 2**index for index in range(len(depths))]
        _check(channels, depths, heads, window, drop_path, frozen_stages)
        self.patch_embed = PatchEmbedding(embed_channels, rngs=rngs)
        self.stages = nnx.List(
            [
                Stage(
                    channels[index],
                    heads[index],
                    depth,
                    window=window,
                    mlp_ratio=mlp_ratio,
                    merge=index < len(depths) - 1,
                    remat=remat,
                    rngs=rngs,
                )
                for index, depth in enumerate(depths)
            ]
        )
        self.norms = nnx.List([layer_norm(count, rngs=rngs) for count in channels])
        self.out_channels = tuple(channels)
        self.depths, self.drop_path, self.frozen_stages = tuple(depths), drop_path, frozen_stages
        if frozen_stages >= 0:
            freeze(self.patch_embed)
        for stage, norm in zip(self.stages[: max(frozen_stages, 0)], self.norms):
            freeze(stage)
            freeze(norm)

    def __call__(
        self, images: jax.Array, sizes: jax.Array, keys: jax.Array | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Normalised images `[B, H, W, 3]` and their valid sizes `[B, 2]`; keys `[B]` draw the drop path, None has none.

        Returns:
          Maps `[B, h, w, C]` of strides 4, 8, 16, 32, and the valid sizes of each.
        """
        rates = np.split(np.linspace(0, self.drop_path, sum(self.depths)), np.cumsum(self.depths)[:-1])
        keys = list(split_keys(keys, len(self.stages)))
        # Frozen stages are in evaluation mode.
        frozen = max(self.frozen_stages, 0)
        keys[:frozen] = [None] * frozen
        x, sizes = self.patch_embed(images, sizes)
        features, feature_sizes = [], []
        for stage, norm, rate, stage_keys in zip(self.stages, self.norms, rates, keys):
            x = stage(x, sizes, rate, stage_keys)
            features.append(norm(x))
            feature_sizes.append(sizes)
            if stage.merge is not None:
                x, sizes = stage.merge(x, sizes)
        return features, feature_sizes


def _check(
    channels: Sequence[int], depths: Sequence[int], heads: Sequence[int], window: int, drop_path: float, frozen_stages: int
) -> None:
    where = "config.model.backbone"
    if not depths or any(depth < 2 or depth % 2 for depth in depths):
        raise UserError(f"{where}.depths is {tuple(depths)}; each stage needs an even number of blocks, at least 2.")
    if len(heads) != len(depths):
        raise UserError(f"{where}.heads is {tuple(heads)}; it needs one entry for each of the {len(depths)} stages.")
    for stage, (count, head_count) in enumerate(zip(channels, heads)):
        if head_count < 1 or count % head_count:
            raise UserError(
                f"{where}.heads is {tuple(heads)}; {count} channels (stage {stage}) do not divide into {head_count} heads."
            )
    if window < 1:
        raise UserError(f"{where}.window is {window}; it must be at least 1.")
    if not 0 <= drop_path < 1:
        raise UserError(f"{where}.drop_path is {drop_path}; it must be at least 0 and below 1.")
    if frozen_stages > len(depths):
        raise UserError(f"{where}.frozen_stages is {frozen_stages}; there are {len(depths)} stages.")
