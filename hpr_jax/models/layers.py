"""Small building blocks: linear layers with the official initialisation, FFN, MLP, norms, stacks of equal layers.

Everything computes in the type of its input, float32 or bfloat16; parameters are float32.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hpr_jax.errors import UserError
from hpr_jax.ops.chunks import by_chunks
from hpr_jax.ops.convolution import convolution
from hpr_jax.ops.layer_norm import _normalized, _normalized_backward, _normalized_forward, normalized
from hpr_jax.ops.linear import _affine, _affine_backward, affine
from hpr_jax.ops.padding import valid_mask, zero_padding

T = TypeVar("T", bound=nnx.Module)

# Of a feed-forward network at once: their hidden values stay in a CPU's caches.
ROWS = 2048


class Frozen(nnx.Variable):
    """A tensor that no optimizer sees: running statistics, and weights of frozen stages."""


def freeze(module: nnx.Module) -> None:
    """Turns every parameter below `module` into a `Frozen` one, in place."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, Frozen(value.get_value()))


def kept(x: jax.Array) -> jax.Array:
    """Marks what `rematerialized` keeps: the small result of a large computation."""
    return checkpoint_name(x, "kept")


def rematerialized(function: Callable) -> Callable:
    """`function`, whose backward pass computes its inner values again, but not those that are marked as `kept`."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names("kept"))


def uniform(bound: float) -> nnx.Initializer:
    """Uniform in [-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


_affine.defvjp(lambda x, kernel, bias: (_affine(x, kernel, bias), (x, kernel, bias)), _affine_backward)


class Linear(nnx.Linear):
    """Linear layer that computes in the type of its input, whatever that of its parameters."""

    def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
        """`[..., in]` -> `[..., out]`, or some columns of that."""
        bias = None if self.bias is None else self.bias[columns]
        return affine(x, self.kernel[:, columns], bias)


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation with scale and bias, in float32; the result has the type of its input."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return normalized(x, self.scale[...], self.bias[...], self.epsilon)


_normalized.defvjp(_normalized_forward, _normalized_backward)


def linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, kernel_init: nnx.Initializer | None = None) -> Linear:
    """Linear layer initialised as PyTorch does by default, or with another kernel (bias as by default)."""
    default = uniform(inputs**-0.5)
    return Linear(inputs, outputs, rngs=rngs, kernel_init=kernel_init or default, bias_init=default)


def xavier_linear(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> Linear:
    """Linear layer with a Xavier-uniform kernel, as in the official encoder and decoder."""
    return linear(inputs, outputs, rngs=rngs, kernel_init=nnx.initializers.xavier_uniform())


def layer_norm(channels: int, *, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(channels, epsilon=1e-5, rngs=rngs)


class FeedForward(nnx.Module):
    """x + W2 relu(W1 x)."""

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.expand = xavier_linear(channels, hidden, rngs=rngs)
        self.contract = xavier_linear(hidden, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        return x + kept(by_chunks(lambda rows: self.contract(jax.nn.relu(self.expand(rows))), ROWS, rows)).reshape(x.shape)


class MLP(nnx.Module):
    """Linear layers with ReLU between them, `sizes` from input to output."""

    def __init__(self, *sizes: int, rngs: nnx.Rngs, make: Callable[..., Linear] = linear):
        self.layers = nnx.List([make(a, b, rngs=rngs) for a, b in zip(sizes[:-1], sizes[1:])])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class GroupNorm(nnx.Module):
    """Group normalisation whose statistics are taken over the valid pixels alone (padding invariance)."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        if channels % groups:
            raise UserError(f"{channels} channels do not divide into {groups} groups; see config.model.neck.groups.")
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`[B, h, w, C]` with valid sizes `[B, 2]` -> the same shape; padding holds arbitrary finite values."""
        batch, height, width, channels = x.shape
        inside = jnp.where(valid_mask(sizes, height, width), x, 0).astype(jnp.float32)
        count = (sizes[:, 0] * sizes[:, 1] * (channels // self.groups)).astype(jnp.float32)[:, None]

        def mean(per_pixel):
            per_group = jnp.sum(per_pixel, axis=(1, 2)).reshape(batch, self.groups, -1)
            return jnp.sum(per_group, axis=-1) / count

        # Both moments in one pass over the map, then one multiplication and addition: maps are large, memory is slow.
        center = mean(inside)
        variance = jnp.maximum(mean(jnp.square(inside)) - jnp.square(center), 0.0)
        inverse = jax.lax.rsqrt(variance + 1e-5)

        def per_channel(per_group):
            return jnp.repeat(per_group, channels // self.groups, axis=1)

        scale = per_channel(inverse) * self.scale
        shift = self.bias - per_channel(center * inverse) * self.scale
        return (x * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], T], count: int, *, rngs: nnx.Rngs) -> T:
    """`count` independently initialised copies of one module, every variable with a leading layer axis.

    The result is a pytree: `jax.lax.scan` and `jax.vmap` run over it, `layer(stacked, i)` is one of the copies.
    """
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


def layer(stacked: T, index: int) -> T:
    """Copy `index` of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


class Conv(nnx.Module):
    """Convolution without bias, zero-padded by k // 2; padding beyond the valid area never enters.

    1x1 kernels are `[in, out]` and run as matrix products (on CPUs their gradients are six times faster so); others are
    `[k, k, in, out]`.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1, *, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape = (inputs, outputs) if kernel_size == 1 else (kernel_size, kernel_size, inputs, outputs)
        self.kernel = nnx.Param(init(rngs.params(), shape))
        self.kernel_size, self.stride = kernel_size, stride

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`[B, h, w, in]` -> `[B, ceil(h / stride), ceil(w / stride), out]`."""
        kernel = self.kernel.get_value()
        if self.kernel_size == 1:
            return affine(x[:, :: self.stride, :: self.stride], kernel, None)
        return convolution(zero_padding(x, sizes), kernel, self.stride)
