"""Box formats, overlaps of boxes, and the inverse of the sigmoid. Boxes are `[..., 4]`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cxcywh_to_xyxy(boxes: jax.Array) -> jax.Array:
    """(centre x, centre y, width, height) -> (left, top, right, bottom)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([center - 0.5 * size, center + 0.5 * size], axis=-1)


def xyxy_to_cxcywh(boxes: jax.Array) -> jax.Array:
    """(left, top, right, bottom) -> (centre x, centre y, width, height)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([0.5 * (low + high), high - low], axis=-1)


def whwh(sizes: jax.Array) -> jax.Array:
    """Scale of normalised boxes: (height, width) `[..., 2]` -> float32 (width, height, width, height) `[..., 4]`."""
    wh = sizes[..., ::-1].astype(jnp.float32)
    return jnp.concatenate([wh, wh], axis=-1)


def inverse_sigmoid(x: jax.Array, eps: float) -> jax.Array:
    """log(x / (1 - x)) of x clipped to [0, 1], whose numerator and denominator count as at least `eps`."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1.0 - x, eps))


def area(boxes: jax.Array) -> jax.Array:
    """Area of xyxy boxes `[..., 4]` -> `[...]`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Areas of the intersection and of the union of xyxy boxes, whose leading axes are broadcast against each other."""
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    intersection = jnp.prod(jnp.maximum(high - low, 0.0), axis=-1)
    return intersection, area(a) + area(b) - intersection


def iou(a: jax.Array, b: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Intersection over union of xyxy boxes, broadcast like `intersection_and_union`; the union counts as at least `eps`."""
    intersection, union = intersection_and_union(a, b)
    return intersection / jnp.maximum(union, eps)


def generalized_iou(a: jax.Array, b: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Generalised IoU (Rezatofighi et al. 2019) of xyxy boxes, in [-1, 1], broadcast like `intersection_and_union`. The
    areas of the union and of the enclosing box count as at least `eps`."""
    intersection, union = intersection_and_union(a, b)
    union = jnp.maximum(union, eps)
    low = jnp.minimum(a[..., :2], b[..., :2])
    high = jnp.maximum(a[..., 2:], b[..., 2:])
    enclosing = jnp.maximum(jnp.prod(jnp.maximum(high - low, 0.0), axis=-1), eps)
    return intersection / union - (enclosing - union) / enclosing


def pixel_overlap(
    overlap: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array, b: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Overlap of normalised boxes, computed in pixels, where the smallest area `eps` of the overlaps is negligible.

    Args:
      overlap: `iou` or `generalized_iou`.
      a, b: cxcywh `[B, Q, 4]`, compared pair by pair.
      sizes: (height, width) of the images in pixels, `[B, 2]`.

    Returns:
      `[B, Q]`.
    """
    scale = whwh(sizes)[:, None]
    return overlap(cxcywh_to_xyxy(a) * scale, cxcywh_to_xyxy(b) * scale)
