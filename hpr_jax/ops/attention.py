"""Dot-product attention that is fast on CPUs, too."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hpr_jax.kernels import attention as kernel
from hpr_jax.kernels.manual_axes import vary_alike
from hpr_jax.ops.dispatch import dispatch
from hpr_jax.ops.precision import of_products, products

# Number of probabilities of a head (queries times keys) from which on they are not kept for the backward pass. Fewer, such
# as those of a region's pixels, fit a CPU's cache for all heads together.
LARGE = 2**14
# The logit of a key that a query may not see. It is finite, so that a query which may see no key has a finite result.
MASKED = -1e30
# Most channels of a head that the kernel takes.
WIDEST = 128
# Name of the operation in messages.
OPERATION = "attention"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention: softmax(query key^T / sqrt(D)) value (Vaswani et al. 2017, equation 1).

    A query that may see no key gets the mean of all values. With many queries and keys, it is differentiable in reverse mode
    only, and the backward pass computes the probabilities again.

    Args:
      query: `[B, Q, H, D]`.
      key, value: `[B, K, H, D]`.
      mask: bool `[B, Q, K]`, true: may see. Its B and Q may be 1: the same for all. None: all see all.
      implementation: see `dispatch`; it counts with many queries and keys.

    Returns:
      `[B, Q, H, D]` in the type of `value`.
    """
    if query.shape[1] * key.shape[1] < LARGE:
        return jax.nn.dot_product_attention(query, key, value, mask=None if mask is None else mask[:, None])
    mask = jnp.ones((1, 1, key.shape[1]), bool) if mask is None else mask
    return _attend(implementation, of_products(), *vary_alike(query, key, value, mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation, precision, query, key, value, mask):
    return _forward(implementation, precision, query, key, value, mask)[0]


def _forward(implementation, precision, *arguments):
    pallas = functools.partial(kernel.forward, masked=MASKED)
    with products(precision):
        results = dispatch(
            OPERATION, implementation, _forward_xla, pallas, *arguments, obstacle=_obstacle(implementation, *arguments)
        )
    out, largest, total = results
    return out, (*arguments, largest, total)


def _backward(implementation, precision, residuals, gradient):
    given = *residuals, gradient
    pallas = functools.partial(kernel.backward, masked=MASKED)
    with products(precision):
        gradients = dispatch(
            OPERATION, implementation, _backward_xla, pallas, *given, obstacle=_obstacle(implementation, *residuals)
        )
    return *gradients, None


_attend.defvjp(_forward, _backward)


def _obstacle(implementation: str | None, query: jax.Array, key: jax.Array, value: jax.Array, *_: jax.Array) -> str | None:
    """Why the kernel cannot take these arguments, or by default does not, as `dispatch` wants it."""
    types = {query.dtype, key.dtype, value.dtype}
    if len(types) > 1 or query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"its kernel takes float32, bfloat16 or float16, and query, key and value are {', '.join(map(str, types))}"
    if implementation is None and query.dtype == jnp.float32:
        return "in float32, XLA's products have tensor cores, and its kernel's do not"
    if query.shape[-1] > WIDEST:
        return f"its kernel takes up to {WIDEST} channels of a head, and there are {query.shape[-1]}"
    return None


def _forward_xla(query, key, value, mask):
    """The results of `kernels.attention.forward`."""
    arrays = [jnp.moveaxis(array, 2, 1) for array in (query, key, value)]
    out, largest, total = _head_by_head(_head_forward, *arrays, mask)
    return jnp.moveaxis(out, 1, 2), largest, total


def _backward_xla(query, key, value, mask, largest, total, gradient):
    """The results of `kernels.attention.backward`."""
    arrays = [jnp.moveaxis(array, 2, 1) for array in (query, key, value, gradient)]
    gradients = _head_by_head(_head_backward, *arrays, largest, total, mask)
    return tuple(jnp.moveaxis(array, 1, 2) for array in gradients)


def _head_by_head(function: Callable[..., Any], *arguments: jax.Array) -> Any:
    """Calls a function of one head of one image for all of them; CPUs take one after the other, since one fits their cache.

    Args:
      function: its last argument is the mask, `[Q or 1, K]`.
      arguments: `[B, H, ...]`, and the mask `[B or 1, Q or 1, K]`.
    """

    def run(loop, *arguments):
        *arrays, mask = arguments
        mask = jnp.broadcast_to(mask, (arrays[0].shape[0], *mask.shape[1:]))

        def image(args):
            *arrays, mask = args
            return loop(lambda head: function(*head, mask), tuple(arrays))

        return loop(image, (*arrays, mask))

    one_by_one = functools.partial(run, jax.lax.map)
    together = functools.partial(run, lambda function, args: jax.vmap(function)(args))
    return jax.lax.platform_dependent(*arguments, cpu=one_by_one, default=together)


def _product(left, right, axes):
    """Matrix product over `axes`, in float32."""
    return jax.lax.dot_general(left, right, (axes, ((), ())), preferred_element_type=jnp.float32)


def _logits(query, key, mask):
    return jnp.where(mask, _product(query, key, ((1,), (1,))) * query.shape[-1] ** -0.5, MASKED)


def _head_forward(query, key, value, mask):
    """Of one head of one image, `[Q, D]`, `[K, D]`, `[K, D]` and mask bool `[Q or 1, K]`: the result `[Q, D]`, and for each
    query the largest logit, and the sum of the exponentials of logits less that."""
    logits = _logits(query, key, mask)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_product(weights.astype(value.dtype), value, ((1,), (0,))) / total).astype(value.dtype)
    return out, largest[:, 0], total[:, 0]


def _head_backward(query, key, value, gradient, largest, total, mask):
    weights = jnp.exp(_logits(query, key, mask) - largest[:, None]) / total[:, None]
    weights_gradient = _product(gradient, value, ((1,), (1,)))
    centered = weights_gradient - jnp.sum(weights * weights_gradient, axis=-1, keepdims=True)
    logits_gradient = weights * centered * query.shape[-1] ** -0.5
    logits_gradient = jnp.where(mask, logits_gradient, 0.0).astype(query.dtype)
    query_gradient = _product(logits_gradient, key, ((1,), (0,)))
    key_gradient = _product(logits_gradient, query, ((0,), (0,)))
    value_gradient = _product(weights.astype(gradient.dtype), gradient, ((0,), (0,)))
    return query_gradient.astype(query.dtype), key_gradient.astype(key.dtype), value_gradient.astype(value.dtype)
