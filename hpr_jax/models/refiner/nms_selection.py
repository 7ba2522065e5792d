"""The selection of distinct queries between layers (DDQ, Zhang et al. 2023)."""

import jax
import jax.numpy as jnp

from hpr_jax.ops.boxes import cxcywh_to_xyxy
from hpr_jax.ops.nms import nms_mask


def distinct_attention(selected: jax.Array) -> jax.Array:
    """DDQ's attention mask: selected queries see all and are seen by all. bool `[B, M]` -> `[B, M, M]`, true: may see."""
    return selected[:, :, None] | selected[:, None, :]


def valid_queries(selected: jax.Array) -> jax.Array:
    """Which queries enter the next selection, the losses and the detections: bool `[..., M]` -> `[..., M]`.

    These are the selected ones, and all if query 0 is selected: the published implementation reads them from row 0 of the
    attention mask, which is true everywhere if query 0 is selected.
    """
    return selected | selected[..., :1]


def select_distinct(
    scores: jax.Array,
    boxes: jax.Array,
    selected: jax.Array,
    duplicates: jax.Array,
    threshold: float,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """DDQ's selection behind a layer: NMS among the valid queries of one image.

    Args:
      scores: `[M]`.
      boxes: normalised cxcywh `[M, 4]`.
      selected: bool `[M]`, the selection in front of the layer.
      duplicates: bool `[M]`, queries that started out identical. As long as they have been selected alike they are still
        identical but for rounding. They take the scores and boxes of the first among them, so that rounding decides nothing
        and ties go to the lowest index.
      threshold: a query suppresses a worse one if their IoU is above this.
      implementation: of NMS.

    Returns:
      bool `[M]`, the selection behind the layer.
    """
    first = jnp.where(selected, jnp.argmax(duplicates & selected), jnp.argmax(duplicates & ~selected))
    same_as = jnp.where(duplicates, first, jnp.arange(len(scores)))
    candidates = cxcywh_to_xyxy(boxes[same_as]), scores[same_as], valid_queries(selected)
    return nms_mask(*candidates, threshold, implementation=implementation)
