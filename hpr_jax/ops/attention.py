"""Dot-product attention that is fast on CPUs, too."""

import jax
import jax.numpy as jnp

from hpr_jax.kernels.manual_axes import vary_alike

# With so many probabilities a head, CPUs take one head after the other. Fewer, as those of a region's pixels, fit into the
# caches anyhow.
LARGE = 2**14
# The logit of what a query may not see. Not infinite, so that a query which sees nothing has a result.
MASKED = -1e30


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Sums of the values, weighted by the softmax of the products of query and keys over the root of D.

    A query that may see nothing gets the mean of all values. On CPUs, with many queries and keys, differentiable in reverse
    mode only.

    Args:
      query: `[B, Q, H, D]`; key, value: `[B, K, H, D]`.
      mask: bool `[B, Q, K]`, true: may see; B and Q may be 1, for all.

    Returns:
      `[B, Q, H, D]` in the type of `value`.
    """
    if jax.default_backend() != "cpu" or query.shape[1] * key.shape[1] < LARGE:
        return jax.nn.dot_product_attention(query, key, value, mask=None if mask is None else mask[:, None])
    mask = jnp.ones((1, 1, 1), bool) if mask is None else mask
    mask = jnp.broadcast_to(mask, (len(query), *mask.shape[1:]))

    def of_image(args):
        *heads, mask = args
        heads = [jnp.moveaxis(array, 1, 0) for array in heads]
        return jnp.moveaxis(jax.lax.map(lambda head: _of_head(*head, mask), heads), 0, 1)

    return jax.lax.map(of_image, tuple(vary_alike(query, key, value, mask)))


@jax.custom_vjp
def _of_head(query, key, value, mask):
    """`[Q, D]`, `[K, D]`, `[K, D]` and bool `[Q, K]` -> `[Q, D]`. The backward pass computes the probabilities again."""
    return _head_forward(query, key, value, mask)[0]


def _product(left, right, axes):
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
    of_weights = _product(gradient, value, ((1,), (1,)))
    of_logits = weights * (of_weights - jnp.sum(weights * of_weights, axis=-1, keepdims=True)) * query.shape[-1] ** -0.5
    of_logits = jnp.where(mask, of_logits, 0.0).astype(query.dtype)
    of_query = _product(of_logits, key, ((1,), (0,)))
    of_key = _product(of_logits, query, ((0,), (0,)))
    of_value = _product(weights.astype(gradient.dtype), gradient, ((0,), (0,)))
    return of_query.astype(query.dtype), of_key.astype(key.dtype), of_value.astype(value.dtype), None


_of_head.defvjp(_head_forward, _head_backward)
