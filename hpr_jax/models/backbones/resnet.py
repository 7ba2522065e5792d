"""ResNet with bottleneck blocks (He et al. 2016), whose stride is in the 3x3 convolution; padding-invariant."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.backbones.maps import check_first_map
from hpr_jax.models.layers import Conv, Frozen, GroupNorm, freeze, rematerialized, saved
from hpr_jax.ops.padding import halve, zero_padding


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation whose statistics, scale and bias are not trained."""

    def __init__(self, channels: int):
        self.scale = Frozen(jnp.ones(channels))
        self.bias = Frozen(jnp.zeros(channels))
        self.mean = Frozen(jnp.zeros(channels))
        self.variance = Frozen(jnp.ones(channels))

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h, w, C]`; `sizes` are not read."""
        scale = self.scale * jax.lax.rsqrt(self.variance + 1e-5)
        return (x * scale + (self.bias - self.mean * scale)).astype(x.dtype)


# The norm behind the convolutions: `frozen_batch` for pre-trained weights, `group`, which is trained, from scratch.
NormKind = Literal["frozen_batch", "group"]
NORMS = get_args(NormKind)


def make_norm(kind: NormKind, channels: int, *, rngs: nnx.Rngs) -> FrozenBatchNorm | GroupNorm:
    """A norm of this kind, of at most 32 groups with at least 4 channels each."""
    return FrozenBatchNorm(channels) if kind == "frozen_batch" else GroupNorm(channels, min(32, channels // 4), rngs=rngs)


class Bottleneck(nnx.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, with a residual around them.

    Args:
      channels: between the convolutions; the result has four times as many.
      stride: 1 or 2.
    """

    def __init__(self, inputs: int, channels: int, stride: int, norm: NormKind, *, rngs: nnx.Rngs):
        outputs = 4 * channels
        self.conv1 = Conv(inputs, channels, 1, rngs=rngs)
        self.norm1 = make_norm(norm, channels, rngs=rngs)
        self.conv2 = Conv(channels, channels, 3, stride, rngs=rngs)
        self.norm2 = make_norm(norm, channels, rngs=rngs)
        self.conv3 = Conv(channels, outputs, 1, rngs=rngs)
        self.norm3 = make_norm(norm, outputs, rngs=rngs)
        self.shortcut: Conv | None = nnx.data(None)
        self.shortcut_norm: FrozenBatchNorm | GroupNorm | None = nnx.data(None)
        if stride != 1 or inputs != outputs:
            self.shortcut = Conv(inputs, outputs, 1, stride, rngs=rngs)
            self.shortcut_norm = make_norm(norm, outputs, rngs=rngs)
        self.stride = stride

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`[B, h, w, in]` and its valid sizes `[B, 2]` -> `[B, ceil(h / stride), ceil(w / stride), 4 * channels]`."""
        out_sizes = halve(sizes) if self.stride == 2 else sizes
        out = jax.nn.relu(self.norm1(self.conv1(x, sizes), sizes))
        out = jax.nn.relu(self.norm2(saved(self.conv2(out, sizes)), out_sizes))
        out = self.norm3(self.conv3(out, out_sizes), out_sizes)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x, sizes), out_sizes)
        return jax.nn.relu(out + x)


class ResNet(nnx.Module):
    """ResNet whose features are the results of its stages (of four stages, with strides 4, 8, 16, 32), by default of all but
    the first.

    Args:
      blocks: number of bottlenecks of each stage; (3, 4, 6, 3) is ResNet-50.
      base_channels: number of channels of the stem, 64 in the paper.
      norm: see `NormKind`.
      first_map: the first stage whose result is a feature, counted from 0.
      frozen_stages: -1: everything is trained; 0: the stem is frozen; n: the first n stages are frozen, too.
      remat: whether the backward pass computes the 3x3 convolutions of the blocks again, too.

    Raises:
      UserError: settings out of range, or an unknown norm.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        base_channels: int = 64,
        norm: NormKind = "frozen_batch",
        first_map: int = 1,
        frozen_stages: int = 1,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if len(blocks) < 1 or min(blocks) < 1 or base_channels < 1 or frozen_stages > len(blocks):
            raise UserError(
                f"{tuple(blocks)} blocks, {base_channels} base_channels and {frozen_stages} frozen_stages make no ResNet; "
                "it needs stages, each of at least one block and one channel, and can freeze no more than these."
            )
        check_first_map(first_map, len(blocks))
        if norm not in NORMS:
            raise UserError(f"norm is {norm!r}; known are {', '.join(NORMS)}.")
        self.stem = Conv(3, base_channels, 7, 2, rngs=rngs)
        self.stem_norm = make_norm(norm, base_channels, rngs=rngs)
        stages: list[nnx.List[Bottleneck]] = []
        inputs = base_channels
        for index, count in enumerate(blocks):
            channels = base_channels * 2**index
            stage: nnx.List[Bottleneck] = nnx.List()
            for block in range(count):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(Bottleneck(inputs, channels, stride, norm, rngs=rngs))
                inputs = 4 * channels
            stages.append(stage)
        self.stages = nnx.List(stages)
        self.out_channels = tuple(4 * base_channels * 2**index for index in range(first_map, len(blocks)))
        self.first_map, self.remat = first_map, remat
        if frozen_stages >= 0:
            freeze(self.stem)
            freeze(self.stem_norm)
        for stage in self.stages[: max(frozen_stages, 0)]:
            freeze(stage)

    def __call__(
        self, images: jax.Array, sizes: jax.Array, keys: jax.Array | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Computes the features.

        Args:
          images: normalised `[B, H, W, 3]`.
          sizes: int32 `[B, 2]`, valid (height, width) in pixels.
          keys: not read, since nothing here is random.

        Returns:
          Maps `[B, h, w, C]` of strides 4, 8, 16, 32, from `first_map` on, and the valid sizes `[B, 2]` of each.
        """
        x = jax.named_scope("stem")(self.stem)(images, sizes)
        sizes = halve(sizes)
        x = jax.nn.relu(jax.named_scope("stem_norm")(self.stem_norm)(x, sizes))
        # All values are at least zero, so zeros outside of the valid area do not change the maxima inside.
        x = jax.lax.reduce_window(
            zero_padding(x, sizes), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        )
        sizes = halve(sizes)
        # The backward pass computes the inner values of a block again: from its input, and without `remat` also from the
        # result of its 3x3 convolution, which is saved.
        run = jax.checkpoint if self.remat else rematerialized
        features, feature_sizes = [], []
        for index, stage in enumerate(self.stages):
            for block in stage:
                x = jax.named_scope(f"stages/{index}")(run(Bottleneck.__call__))(block, x, sizes)
                sizes = halve(sizes) if block.stride == 2 else sizes
            features.append(x)
            feature_sizes.append(sizes)
        return features[self.first_map :], feature_sizes[self.first_map :]
