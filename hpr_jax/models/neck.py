"""The neck: projects the maps of the backbone to one number of channels, and adds coarser levels.

Deformable DETR, Zhu et al. 2021, section A.2.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.layers import Conv, GroupNorm, uniform
from hpr_jax.ops.padding import halve


class Projection(nnx.Module):
    """Convolution and group normalisation.

    Args:
      stride: 1 or 2.
      groups: of the normalisation.
      bias: whether the convolution has one.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int, groups: int, bias: bool, *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, kernel_size, stride, rngs=rngs)
        xavier = uniform((6 / ((inputs + outputs) * kernel_size**2)) ** 0.5)
        self.conv.kernel = nnx.Param(xavier(rngs.params(), self.conv.kernel.shape))
        self.bias: nnx.Param[jax.Array] | None = nnx.Param(jnp.zeros(outputs)) if bias else nnx.data(None)
        self.norm = GroupNorm(outputs, groups, rngs=rngs)
        self.stride = stride

    def __call__(self, x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map `[B, h, w, in]` and its valid sizes `[B, 2]` -> `[B, ceil(h / stride), ceil(w / stride), out]` and its valid
        sizes."""
        x = self.conv(x, sizes)
        if self.bias is not None:
            x = x + self.bias.get_value().astype(x.dtype)
        if self.stride == 2:
            sizes = halve(sizes)
        return self.norm(x, sizes), sizes


class ChannelMapper(nnx.Module):
    """One 1x1 projection for each map of the backbone, then 3x3 projections of stride 2, each of the map before it, until
    there are `levels` maps. The first of these projects the last map of the backbone.

    Args:
      in_channels: of the maps of the backbone.
      channels: C, of all levels.
      groups, bias: see `Projection`.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, levels: int, *, groups: int, bias: bool, rngs: nnx.Rngs):
        self.projections = nnx.List([Projection(n, channels, 1, 1, groups, bias, rngs=rngs) for n in in_channels])
        extra = levels - len(in_channels)
        inputs = [in_channels[-1]] + [channels] * max(extra - 1, 0)
        self.extra = nnx.List([Projection(n, channels, 3, 2, groups, bias, rngs=rngs) for n in inputs[:extra]])

    def __call__(self, features: Sequence[jax.Array], sizes: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Maps `[B, h, w, C_i]` of the backbone and their valid sizes `[B, 2]` -> maps `[B, h, w, C]` of all levels, and
        their valid sizes."""
        out = [
            jax.named_scope(f"projections/{index}")(project)(x, size)
            for index, (project, x, size) in enumerate(zip(self.projections, features, sizes))
        ]
        x, size = features[-1], sizes[-1]
        for index, project in enumerate(self.extra):
            x, size = jax.named_scope(f"extra/{index}")(project)(x, size)
            out.append((x, size))
        maps, out_sizes = zip(*out)
        return list(maps), list(out_sizes)
