"""Dot-product attention that is fast on CPUs, too."""

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike

# Number of probabilities of a head (queries times keys) at which CPUs begin to compute one head after the other. Fewer, such
# as those of a region's pixels, fit a CPU's cache for all heads together.
LARGE = 2**14
# The logit of a key that a query may not see. It is finite, so that a query which may see no key has a finite result.
MASKED = -1e30


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Scaled dot-product attention: softmax(query key^T / sqrt(D)) value (Vaswani et al. 2017, equation 1).

    A query that may see no key gets the mean of all values. With many queries and keys, on CPUs, it is differentiable in
    reverse mode only.

    Args:
      query: `[B, Q, H, D]`.
      key, value: `[B, K, H, D]`.
      mask: bool `[B, Q, K]`, true: may see. Its B and Q may be 1: the same for all. None: all see all.

    Returns:
      `[B, Q, H, D]` in the type of `value`.
    """
    if jax.default_backend() != "cpu" or query.shape[1] * key.shape[1] < LARGE:
        return jax.nn.dot_product_attention(query, key, value, mask=None if mask is None else mask[:, None])
    mask = jnp.ones((1, 1, 1), bool) if mask is None else mask
    mask = jnp.broadcast_to(mask, (len(query), *mask.shape[1:]))

    def attend_image(args):
        *arrays, mask = args
        by_head = [jnp.moveaxis(array, 1, 0) for array in arrays]
        return jnp.moveaxis(jax.lax.map(lambda head: _attend_head(*head, mask), by_head), 0, 1)

    return jax.lax.map(attend_image, tuple(vary_alike(query, key, value, mask)))


@jax.custom_vjp
def _attend_head(query, key, value, mask):
    """Attention of one head of one image: `[Q, D]`, `[K, D]`, `[K, D]` and mask bool `[Q, K]` -> `[Q, D]`. The backward pass
    computes the probabilities again."""
    return _head_forward(query, key, value, mask)[0]


def _product(left, right, axes):
    """Matrix product over `axes`, in float32."""
    return jax.lax.dot_general(left, right, (axes, ((), ())), preferred_element_type=jnp.float32)


def _logits(query, key, mask):
    return jnp.where(mask, _product(query, key, ((1,), (1,))) * query.shape[-1] ** -0.5, MASKED)


def _head_forward(query, key, value, mask):
    logits = _logits(query, key, mask)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_product(weights.astype(value.dtype), value, ((1,), (0,))) / total).astype(value.dtype)
    return out, (query, key, value, mask, largest, total)


def _head_backward(residuals, gradient):
    query, key, value, mask, largest, total = residuals
    weights = jnp.exp(_logits(query, key, mask) - largest) / total
    weights_gradient = _product(gradient, value, ((1,), (1,)))
    centered = weights_gradient - jnp.sum(weights * weights_gradient, axis=-1, keepdims=True)
    logits_gradient = weights * centered * query.shape[-1] ** -0.5
    logits_gradient = jnp.where(mask, logits_gradient, 0.0).astype(query.dtype)
    query_gradient = _product(logits_gradient, key, ((1,), (0,)))
    key_gradient = _product(logits_gradient, query, ((0,), (0,)))
    value_gradient = _product(weights.astype(gradient.dtype), gradient, ((0,), (0,)))
    return query_gradient.astype(query.dtype), key_gradient.astype(key.dtype), value_gradient.astype(value.dtype), None


_attend_head.defvjp(_head_forward, _head_backward)
