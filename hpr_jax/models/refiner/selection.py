"""The selection of distinct queries between layers (DDQ)."""

import jax
import jax.numpy as jnp

from hpr_jax.ops.boxes import cxcywh_to_xyxy
from hpr_jax.ops.nms import nms_mask


def distinct_attention(kept: jax.Array) -> jax.Array:
    """DDQ's mask: kept queries see all and are seen by all. bool `[B, M]` -> `[B, M, M]`."""
    return kept[:, :, None] | kept[:, None, :]


def counted(kept: jax.Array) -> jax.Array:
    """Queries that enter the next selection, the loss and the detections: bool `[..., M]` -> the same.

    The published implementation reads them from row 0 of the attention mask, so that all count when query 0 is kept.
    """
    return kept | kept[..., :1]


def select_distinct(scores: jax.Array, boxes: jax.Array, kept: jax.Array, twins: jax.Array, threshold: float) -> jax.Array:
    """DDQ's selection behind a layer: NMS among the queries that count.

    Args:
      scores: `[M]`; boxes: normalised cxcywh `[M, 4]`; kept: bool `[M]`, before the selection.
      twins: bool `[M]`, queries that started out identical. Those that were treated alike still are, but for rounding:
        they take the values of the first of them, so that ties go to the lowest index.

    Returns:
      bool `[M]`.
    """
    first = jnp.where(kept, jnp.argmax(twins & kept), jnp.argmax(twins & ~kept))
    same_as = jnp.where(twins, first, jnp.arange(len(scores)))
    return nms_mask(cxcywh_to_xyxy(boxes[same_as]), scores[same_as], counted(kept), threshold)
