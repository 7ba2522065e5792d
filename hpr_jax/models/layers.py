"""Small building blocks: linear layers with the official initialisation, FFN, MLP, norms, convolution, stacks of layers.

Each block computes in the type of its input, float32 or bfloat16; parameters are float32.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hpr_jax.errors import UserError
from hpr_jax.ops.chunks import by_chunks
from hpr_jax.ops.convolution import convolution
from hpr_jax.ops.layer_norm import normalized
from hpr_jax.ops.linear import affine
from hpr_jax.ops.order import materialized
from hpr_jax.ops.padding import valid_mask
from hpr_jax.ops.platform import target_platform

T = TypeVar("T", bound=nnx.Module)
Carry = TypeVar("Carry")

# Number of rows per chunk of a feed-forward network, chosen so that a chunk's hidden values fit a CPU's cache.
ROWS = 2048
# The name, in JAX's checkpoint policies, of what `rematerialized` saves.
SAVED = "saved"


class Frozen(nnx.Variable):
    """A variable that is not trained: running statistics, and weights of frozen stages."""


def freeze(module: nnx.Module) -> None:
    """Turns every parameter of `module`, and of the modules in it, into a `Frozen` variable, in place."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, Frozen(value.get_value()))


def saved(x: jax.Array) -> jax.Array:
    """Marks a value that `rematerialized` saves for the backward pass: the small result of a large computation."""
    return checkpoint_name(x, SAVED)


def rematerialized(function: Callable, waiting: bool | tuple[bool, ...] = True) -> Callable:
    """`function`, whose backward pass computes its inner values again, except those that are marked as `saved`.

    Args:
      waiting: for each argument, or for all, whether it must not be read again before there is a gradient of the result.
    """
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    return jax.checkpoint(function, policy=policy, prevent_cse=waiting)


def uniform(bound: float) -> nnx.Initializer:
    """Initialiser that draws uniformly from [-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nnx.Linear):
    """Linear layer that computes in the type of its input, whatever the type of its parameters."""

    def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
        """`[..., in]` -> `[..., out]`, or only these columns of the result."""
        bias = None if self.bias is None else self.bias[columns]
        return affine(x, self.kernel[:, columns], bias)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias. It computes in float32; the result has the type of its input."""

    def __init__(self, channels: int, *, epsilon: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (channels,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (channels,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., C]`."""
        return normalized(x, self.scale[...], self.bias[...], self.epsilon)


def linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, kernel_init: nnx.Initializer | None = None) -> Linear:
    """Linear layer initialised as PyTorch does by default; `kernel_init` replaces the default of the kernel alone."""
    default = uniform(inputs**-0.5)
    return Linear(inputs, outputs, rngs=rngs, kernel_init=kernel_init or default, bias_init=default)


def xavier_linear(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> Linear:
    """Linear layer with a Xavier-uniform kernel, as in the official encoder and decoder."""
    return linear(inputs, outputs, rngs=rngs, kernel_init=nnx.initializers.xavier_uniform())


def layer_norm(channels: int, *, rngs: nnx.Rngs) -> LayerNorm:
    """Layer normalisation with the epsilon of all official layers."""
    return LayerNorm(channels, epsilon=1e-5, rngs=rngs)


class FeedForward(nnx.Module):
    """A feed-forward network with its residual: x + W2 relu(W1 x)."""

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.expand = xavier_linear(channels, hidden, rngs=rngs)
        self.contract = xavier_linear(hidden, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., C]`."""
        rows = x.reshape(-1, x.shape[-1])

        def refine(rows):
            hidden = jax.nn.relu(jax.named_scope("expand")(self.expand)(rows))
            return jax.named_scope("contract")(self.contract)(hidden)

        refined = by_chunks(refine, ROWS, rows)
        return x + saved(refined).reshape(x.shape)


class MLP(nnx.Module):
    """Linear layers with ReLU between them; `sizes` are the numbers of channels, from the input to the output."""

    def __init__(self, *sizes: int, rngs: nnx.Rngs, make: Callable[..., Linear] = linear):
        self.layers = nnx.List([make(a, b, rngs=rngs) for a, b in zip(sizes[:-1], sizes[1:])])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., sizes[0]]` -> `[..., sizes[-1]]`."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class GroupNorm(nnx.Module):
    """Group normalisation whose statistics are taken over the valid pixels alone, so that they do not depend on the padding.

    Raises:
      UserError: the channels do not divide into so many groups.
    """

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        if channels % groups:
            raise UserError(f"{channels} channels do not divide into {groups} groups; choose another number.")
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`[B, h, w, C]` and its valid sizes `[B, 2]` -> `[B, h, w, C]`, whose padding holds arbitrary finite values."""
        batch, height, width, channels = x.shape
        inside = jnp.where(valid_mask(sizes, height, width), x, 0).astype(jnp.float32)
        count = (sizes[:, 0] * sizes[:, 1] * (channels // self.groups)).astype(jnp.float32)[:, None]

        def mean(per_pixel):
            per_group = jnp.sum(per_pixel, axis=(1, 2)).reshape(batch, self.groups, -1)
            return jnp.sum(per_group, axis=-1) / count

        # Both moments are taken in one pass over the map, which is then scaled and shifted in one more: maps are large, and
        # reading them is what takes time.
        center = mean(inside)
        variance = jnp.maximum(mean(jnp.square(inside)) - jnp.square(center), 0.0)
        inverse = jax.lax.rsqrt(variance + 1e-5)

        def per_channel(per_group):
            return jnp.repeat(per_group, channels // self.groups, axis=1)

        scale = per_channel(inverse) * self.scale
        shift = self.bias - per_channel(center * inverse) * self.scale
        return (x * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], T], count: int, *, rngs: nnx.Rngs) -> T:
    """Makes `count` modules of one structure, each initialised on its own, into one whose variables have a leading axis.

    The result is a pytree, over which `jax.lax.scan` and `jax.vmap` can run; `layer(stacked, i)` is one of the modules.
    """
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


def scan_layers(
    step: Callable[[Carry, Any, Any], tuple[Carry, Any]], carry: Carry, shared: Any, stacked: Any, *, remat: bool
) -> tuple[Carry, Any]:
    """`jax.lax.scan` over stacked modules, which on GPUs is no loop.

    A loop copies every variable of a layer before it is read, and in its backward pass every gradient into the stack of
    them: a launch each, of which there are thousands. CPUs keep the loop, which compiles in half of the time.

    Args:
      step: carry, shared, module -> carry, output.
      shared: arrays that all steps read.
      remat: whether steps are `rematerialized`.
    """
    if target_platform() != "gpu":

        def looped(carry, module):
            return step(carry, shared, module)

        return jax.lax.scan(rematerialized(looped) if remat else looped, carry, stacked)

    # Shared arrays pass through all steps. So their gradient is summed step by step, and not once all steps are in memory.
    def unrolled(carry, module):
        carry, shared = carry
        carry, output = step(carry, shared, module)
        return (carry, shared), output

    if remat:
        # What a step starts from waits for the gradient of its result, so that one step at a time is in memory. Variables
        # need not wait, which would copy them.
        unrolled = rematerialized(unrolled, waiting=(True, False))
    (carry, _), outputs = jax.lax.scan(unrolled, (carry, shared), stacked, unroll=True)
    return carry, outputs


def layer(stacked: T, index: int) -> T:
    """Module `index` of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


class Conv(nnx.Module):
    """Convolution without bias, to which everything outside the valid area is zero.

    1x1 kernels are `[in, out]` and applied as matrix products, whose gradients are six times faster on CPUs than those of
    convolutions; other kernels are `[k, k, in, out]`.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1, *, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape = (inputs, outputs) if kernel_size == 1 else (kernel_size, kernel_size, inputs, outputs)
        self.kernel = nnx.Param(init(rngs.params(), shape))
        self.kernel_size, self.stride = kernel_size, stride

    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`[B, h, w, in]` and its valid sizes `[B, 2]` -> `[B, ceil(h / stride), ceil(w / stride), out]`."""
        kernel = self.kernel.get_value()
        if self.kernel_size == 1:
            if self.stride > 1:
                x = materialized(x[:, :: self.stride, :: self.stride])
            return affine(x, kernel, None)
        return convolution(x, kernel, self.stride, sizes)
