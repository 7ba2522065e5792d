"""Losses of queries that stand for one box or for none: DETR's, and Align DETR's."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from hpr_jax.losses.functions import sigmoid_focal_loss
from hpr_jax.ops.boxes import generalized_iou, pixel_overlap
from hpr_jax.types import Predictions, Targets

Terms = dict[str, jax.Array]


class MatchedLoss(Protocol):
    """Terms `class`, `l1` and `giou` of one layer.

    Args:
      predictions: `[B, Q, ...]`.
      positive: bool `[B, Q]`, queries that stand for a box.
      index: int32 `[B, Q]`, index of that box; any valid index elsewhere.
      denoising: whether the queries are noisy copies of the boxes, and not matched with them.
    """

    def __call__(
        self, predictions: Predictions, positive: jax.Array, index: jax.Array, targets: Targets, *, denoising: bool
    ) -> Terms: ...


@dataclasses.dataclass(frozen=True)
class BoxLoss:
    """The box terms that both share: L1 on normalised cxcywh, generalised IoU in pixels."""

    l1_weight: float = 5.0
    giou_weight: float = 2.0

    def __call__(self, boxes: jax.Array, index: jax.Array, weights: jax.Array, targets: Targets, count: jax.Array) -> Terms:
        """Sums over queries of `weights` `[B, Q]`, zero for queries without a box, divided by `count`."""
        goal = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
        l1 = jnp.where(weights[..., None] > 0, jnp.abs(boxes - goal), 0.0) * weights[..., None]
        giou = jnp.where(weights > 0, 1.0 - pixel_overlap(generalized_iou, boxes, goal, targets.sizes), 0.0) * weights
        return {"l1": self.l1_weight * jnp.sum(l1) / count, "giou": self.giou_weight * jnp.sum(giou) / count}


@dataclasses.dataclass(frozen=True)
class FocalMatchedLoss:
    """Focal class loss; everything divided by the number of positive queries, at least 1 (Deformable DETR, DINO)."""

    class_weight: float = 1.0
    boxes: BoxLoss = BoxLoss()

    def __call__(
        self, predictions: Predictions, positive: jax.Array, index: jax.Array, targets: Targets, *, denoising: bool
    ) -> Terms:
        """See `MatchedLoss`."""
        count = jnp.maximum(jnp.sum(positive), 1).astype(jnp.float32)
        focal = sigmoid_focal_loss(predictions.logits, _is_label(predictions, positive, index, targets))
        focal = jnp.where(predictions.valid[..., None], focal, 0.0)
        box_terms = self.boxes(predictions.boxes, index, positive.astype(jnp.float32), targets, count)
        return {"class": self.class_weight * jnp.sum(focal) / count, **box_terms}


def _is_label(predictions: Predictions, positive: jax.Array, index: jax.Array, targets: Targets) -> jax.Array:
    """bool `[B, Q, K]`: the class of each positive query's box."""
    labels = jnp.take_along_axis(targets.labels, index, axis=1)
    return (jnp.arange(predictions.logits.shape[-1]) == labels[..., None]) & positive[..., None]
