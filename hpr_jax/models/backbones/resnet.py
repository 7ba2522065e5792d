"""ResNet with bottleneck blocks (He et al. 2016), stride in the 3x3 convolution, padding-invariant."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.layers import Conv, Frozen, GroupNorm, freeze, kept, rematerialized
from hpr_jax.ops.padding import halve, zero_padding


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation with fixed statistics and fixed affine weights."""

    def __init__(self, channels: int):
        self.scale = Frozen(jnp.ones(channels))
        self.bias = Frozen(jnp.zeros(channels))
        self.mean = Frozen(jnp.zeros(channels))
        self.variance = Frozen(jnp.ones(channels))

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        scale = self.scale * jax.lax.rsqrt(self.variance + 1e-5)
        return (x * scale + (self.bias - self.mean * scale)).astype(x.dtype)


def make_norm(kind: Literal["frozen_batch", "group"], channels: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`frozen_batch` for pre-trained weights, `group` (trainable) for training from scratch."""
    if kind == "frozen_batch":
        return FrozenBatchNorm(channels)
    if kind != "group":
        raise UserError(f"config.model.backbone.norm is {kind!r}; known are frozen_batch and group.")
    return GroupNorm(channels, min(32, channels // 4), rngs=rngs)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolution with a residual; `channels` inside, four times as many outside."""

    def __init__(self, inputs: int, channels: int, stride: int, norm: str, *, rngs: nnx.Rngs):
        outputs = 4 * channels
        self.conv1 = Conv(inputs, channels, 1, rngs=rngs)
        self.norm1 = make_norm(norm, channels, rngs=rngs)
        self.conv2 = Conv(channels, channels, 3, stride, rngs=rngs)
        self.norm2 = make_norm(norm, channels, rngs=rngs)
        self.conv3 = Conv(channels, outputs, 1, rngs=rngs)
        self.norm3 = make_norm(norm, outputs, rngs=rngs)
        self.shortcut = nnx.data(None)
        self.shortcut_norm = nnx.data(None)
        if stride != 1 or inputs != outputs:
            self.shortcut = Conv(inputs, outputs, 1, stride, rngs=rngs)
            self.shortcut_norm = make_norm(norm, outputs, rngs=rngs)
        self.stride = stride

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`[B, h, w, C]` and valid sizes `[B, 2]` -> `[B, h', w', 4 * channels]`."""
        out_sizes = halve(sizes) if self.stride == 2 else sizes
        out = jax.nn.relu(self.norm1(self.conv1(x, sizes), sizes))
        out = jax.nn.relu(self.norm2(kept(self.conv2(out, sizes)), out_sizes))
        out = self.norm3(self.conv3(out, out_sizes), out_sizes)
        if self.shortcut is not None:
            x = self.shortcut_norm(self.shortcut(x, sizes), out_sizes)
        return jax.nn.relu(out + x)


class ResNet(nnx.Module):
    """ResNet whose last three stages (strides 8, 16, 32) are the features.

    Args:
      blocks: bottlenecks per stage; (3, 4, 6, 3) is ResNet-50.
      base_channels: of the stem, 64 in the paper.
      norm: `frozen_batch` or `group`.
      frozen_stages: -1 trains everything, 0 freezes the stem, n also the first n stages.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        base_channels: int = 64,
        norm: Literal["frozen_batch", "group"] = "frozen_batch",
        frozen_stages: int = 1,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if len(blocks) < 2 or min(blocks) < 1 or base_channels < 1 or frozen_stages > len(blocks):
            raise UserError(
                f"config.model.backbone has {tuple(blocks)} blocks, {base_channels} base_channels and {frozen_stages} "
                "frozen_stages; a ResNet needs two stages or more, of at least a block and a channel, to freeze some of."
            )
        self.stem = Conv(3, base_channels, 7, 2, rngs=rngs)
        self.stem_norm = make_norm(norm, base_channels, rngs=rngs)
        stages, inputs = [], base_channels
        for index, count in enumerate(blocks):
            channels = base_channels * 2**index
            stage = []
            for block in range(count):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(Bottleneck(inputs, channels, stride, norm, rngs=rngs))
                inputs = 4 * channels
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        self.out_channels = tuple(4 * base_channels * 2**index for index in range(1, len(blocks)))
        self.remat = remat
        if frozen_stages >= 0:
            freeze(self.stem)
            freeze(self.stem_norm)
        for stage in self.stages[: max(frozen_stages, 0)]:
            freeze(stage)

    def __call__(
        self, images: jax.Array, sizes: jax.Array, keys: jax.Array | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Normalised images `[B, H, W, 3]` and their valid sizes `[B, 2]`; nothing here is random, so `keys` are not read.

        Returns:
          Maps `[B, h, w, C]` of strides 8, 16, 32, and the valid sizes of each.
        """
        x = self.stem(images, sizes)
        sizes = halve(sizes)
        x = jax.nn.relu(self.stem_norm(x, sizes))
        # All values are at least zero, so zeros outside act like the minus infinity of an unpadded pooling.
        x = jax.lax.reduce_window(
            zero_padding(x, sizes), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        )
        sizes = halve(sizes)
        # A block is computed again in the backward pass, from its input and, without `remat`, its 3x3 convolution's result.
        again = jax.checkpoint if self.remat else rematerialized
        features, feature_sizes = [], []
        for stage in self.stages:
            for block in stage:
                x = again(Bottleneck.__call__)(block, x, sizes)
                sizes = halve(sizes) if block.stride == 2 else sizes
            features.append(x)
            feature_sizes.append(sizes)
        return features[1:], feature_sizes[1:]
