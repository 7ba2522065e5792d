"""Swin Transformer (Liu et al. 2021), padding-invariant.

Its attention within windows is in `window_attention.py`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.backbones.maps import check_first_map
from hpr_jax.models.backbones.window_attention import WindowAttention, pad_to_multiple, swin_linear, window_regions
from hpr_jax.models.layers import freeze, layer_norm, stack, uniform
from hpr_jax.ops.padding import halve, zero_padding

# Side of a patch in pixels, which is also the stride of the patch embedding.
PATCH = 4


class PatchEmbedding(nnx.Module):
    """Linear embedding of 4x4 patches, and a norm (section 3.1)."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        init = uniform((3 * PATCH**2) ** -0.5)
        self.kernel = nnx.Param(init(rngs.params(), (PATCH, PATCH, 3, channels)))
        self.bias = nnx.Param(init(rngs.params(), (channels,)))
        self.norm = layer_norm(channels, rngs=rngs)

    def __call__(self, images: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images `[B, H, W, 3]` and valid sizes `[B, 2]` -> map `[B, ceil(H / 4), ceil(W / 4), C]` and its valid sizes."""
        x = pad_to_multiple(zero_padding(images, sizes), PATCH)
        batch, height, width, _ = x.shape
        # Patches do not overlap, so the convolution is a matrix product.
        x = x.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, 3).swapaxes(2, 3)
        x = x.reshape(batch, height // PATCH, width // PATCH, -1)
        kernel = self.kernel.get_value().astype(x.dtype)
        x = x @ kernel.reshape(-1, kernel.shape[-1]) + self.bias.get_value().astype(x.dtype)
        return self.norm(x), -(-sizes // PATCH)


class PatchMerging(nnx.Module):
    """Merges 2x2 tokens into one of twice as many channels (section 3.1).

    To the norm and the reduction, the values of a channel in the four tokens stand side by side, as in mmdet.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(4 * channels, rngs=rngs)
        self.reduction = swin_linear(4 * channels, 2 * channels, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map `[B, h, w, C]` and valid sizes `[B, 2]` -> map `[B, ceil(h / 2), ceil(w / 2), 2 * C]` and its valid sizes."""
        x = pad_to_multiple(zero_padding(x, sizes), 2)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        return self.reduction(self.norm(x)), halve(sizes)


class GeluMLP(nnx.Module):
    """The MLP of a block: W2 gelu(W1 x)."""

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.expand = swin_linear(channels, hidden, rngs=rngs)
        self.contract = swin_linear(hidden, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., C]`."""
        return self.contract(jax.nn.gelu(self.expand(x), approximate=False))


def drop_path(branch: jax.Array, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Stochastic depth: drops the residual branch of an image as a whole, in training (Huang et al. 2016).

    Args:
      branch: `[B, ...]`.
      rate: the probability that an image's branch becomes zero; others are scaled up, so that the mean stays the same.
      keys: `[B]`; None: nothing is dropped.
    """
    if keys is None:
        return branch
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(keys)
    return branch * (keep / (1 - rate)).astype(branch.dtype).reshape(-1, *(1,) * (branch.ndim - 1))


def split_keys(keys: jax.Array | None, count: int) -> jax.Array | None:
    """Splits the key of each image: `[B]` -> `[count, B]`. With a key of its own, what an image drops does not depend on the
    rest of the batch."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def nth_keys(keys: jax.Array | None, index: int) -> jax.Array | None:
    """One of the results of `split_keys`: `[count, B]` -> `[B]`."""
    return None if keys is None else keys[index]


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
        """Runs the block.

        Args:
          x: `[B, h, w, C]`.
          sizes: its valid sizes `[B, 2]`.
          regions: of the windows, see `window_regions`.
          rate, keys: see `drop_path`.

        Returns:
          `[B, h, w, C]`.
        """
        keys = split_keys(keys, 2)
        attended = jax.named_scope("attention")(self.attention)(jax.named_scope("norm1")(self.norm1)(x), sizes, regions)
        x = x + drop_path(attended, rate, nth_keys(keys, 0))
        refined = jax.named_scope("mlp")(self.mlp)(jax.named_scope("norm2")(self.norm2)(x))
        return x + drop_path(refined, rate, nth_keys(keys, 1))


class BlockPair(nnx.Module):
    """A block with plain windows, and one whose windows are shifted by half their side."""

    def __init__(self, channels: int, heads: int, window: int, mlp_ratio: float, *, rngs: nnx.Rngs):
        self.plain = Block(channels, heads, window, 0, mlp_ratio, rngs=rngs)
        self.shifted = Block(channels, heads, window, window // 2, mlp_ratio, rngs=rngs)


class Stage(nnx.Module):
    """The blocks of one resolution, as a stack of pairs, and the patch merging behind them, which the last stage lacks.

    Args:
      depth: number of blocks, even.
      window: side of the windows, in tokens.
      mlp_ratio: hidden channels of the MLPs per channel.
      merge: whether there is a patch merging.
      remat: whether the backward pass computes the inner values of each block again.
    """

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
        self.merge: PatchMerging | None = nnx.data(PatchMerging(channels, rngs=rngs) if merge else None)
        self.window, self.remat = window, remat

    def __call__(self, x: jax.Array, sizes: jax.Array, rates: np.ndarray, keys: jax.Array | None) -> jax.Array:
        """Runs the blocks, without the merging.

        Args:
          x: `[B, h, w, C]`.
          sizes: its valid sizes `[B, 2]`.
          rates: `[depth]`, the rate of each block, see `drop_path`.
          keys: see `drop_path`.

        Returns:
          `[B, h, w, C]`.
        """
        _, height, width, _ = x.shape
        plain = window_regions(sizes, height, width, self.window, 0)
        shifted = window_regions(sizes, height, width, self.window, self.window // 2)
        run = jax.checkpoint(Block.__call__) if self.remat else Block.__call__
        pair_rates = jnp.asarray(rates, jnp.float32).reshape(-1, 2)

        def step(x, scanned):
            pair, rate, keys = scanned
            keys = split_keys(keys, 2)
            x = run(pair.plain, x, sizes, plain, rate[0], nth_keys(keys, 0))
            return run(pair.shifted, x, sizes, shifted, rate[1], nth_keys(keys, 1)), None

        return jax.lax.scan(step, x, (self.pairs, pair_rates, split_keys(keys, len(pair_rates))))[0]


class SwinTransformer(nnx.Module):
    """Swin Transformer whose features are the results of its stages (strides 4, 8, 16, 32), by default of all, each behind a
    norm. The defaults are those of Swin-L.

    Args:
      embed_channels: number of channels of the first stage; each further stage has twice as many as the one before.
      depths: number of blocks of each stage, even, since windows are shifted in every other block.
      heads: number of heads of each stage.
      window: side of the attention windows, in tokens.
      mlp_ratio: hidden channels of the MLPs per channel.
      drop_path: rate of the last block, see the function `drop_path`; from block to block the rates rise linearly from zero.
      first_map: the first stage whose result is a feature, counted from 0.
      frozen_stages: -1: everything is trained; 0: the patch embedding is frozen; n: the first n stages and their norms are
        frozen, too.
      remat: whether the backward pass computes the inner values of each block again.

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
        first_map: int = 0,
        frozen_stages: int = -1,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        channels = [embed_channels * 2**index for index in range(len(depths))]
        _check(channels, depths, heads, window, drop_path, frozen_stages)
        check_first_map(first_map, len(depths))
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
        self.norms = nnx.List([layer_norm(count, rngs=rngs) for count in channels[first_map:]])
        self.out_channels, self.first_map = tuple(channels[first_map:]), first_map
        self.depths, self.drop_path, self.frozen_stages = tuple(depths), drop_path, frozen_stages
        if frozen_stages >= 0:
            freeze(self.patch_embed)
        for index, stage in enumerate(self.stages[: max(frozen_stages, 0)]):
            freeze(stage)
            if index >= first_map:
                freeze(self.norms[index - first_map])

    def __call__(
        self, images: jax.Array, sizes: jax.Array, keys: jax.Array | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Computes the features.

        Args:
          images: normalised `[B, H, W, 3]`.
          sizes: int32 `[B, 2]`, valid (height, width) in pixels.
          keys: `[B]`, see `drop_path`.

        Returns:
          Maps `[B, h, w, C]` of strides 4, 8, 16, 32, from `first_map` on, and the valid sizes `[B, 2]` of each.
        """
        rates = np.split(np.linspace(0, self.drop_path, sum(self.depths)), np.cumsum(self.depths)[:-1])
        keys = split_keys(keys, len(self.stages))
        x, sizes = jax.named_scope("patch_embed")(self.patch_embed)(images, sizes)
        features, feature_sizes = [], []
        for index, (stage, stage_rates) in enumerate(zip(self.stages, rates)):
            # Frozen stages drop nothing.
            stage_keys = None if index < self.frozen_stages else nth_keys(keys, index)
            x = jax.named_scope(f"stages/{index}")(stage)(x, sizes, stage_rates, stage_keys)
            if index >= self.first_map:
                features.append(jax.named_scope("norms")(self.norms[index - self.first_map])(x))
                feature_sizes.append(sizes)
            if stage.merge is not None:
                x, sizes = jax.named_scope(f"stages/{index}/merge")(stage.merge)(x, sizes)
        return features, feature_sizes


def _check(
    channels: Sequence[int], depths: Sequence[int], heads: Sequence[int], window: int, drop_path: float, frozen_stages: int
) -> None:
    if not depths or any(depth < 2 or depth % 2 for depth in depths):
        raise UserError(f"depths is {tuple(depths)}; each stage needs an even number of blocks, at least 2.")
    if len(heads) != len(depths):
        raise UserError(f"heads is {tuple(heads)}; it needs one entry for each of the {len(depths)} stages.")
    for stage, (count, head_count) in enumerate(zip(channels, heads)):
        if head_count < 1 or count % head_count:
            raise UserError(
                f"heads is {tuple(heads)}; {count} channels (stage {stage}) do not divide into {head_count} heads."
            )
    if window < 1:
        raise UserError(f"window is {window}; it must be at least 1.")
    if not 0 <= drop_path < 1:
        raise UserError(f"drop_path is {drop_path}; it must be at least 0 and below 1.")
    if frozen_stages > len(depths):
        raise UserError(f"frozen_stages is {frozen_stages}; there are {len(depths)} stages.")
