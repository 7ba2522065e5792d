"""Losses of queries that each stand for one box or for none: matching and denoising queries."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from hpr_jax.losses.functions import sigmoid_focal_loss
from hpr_jax.ops.boxes import generalized_iou, pixel_overlap
from hpr_jax.types import Predictions, Targets

# Loss terms by name: scalars, or `[B]` with one value for each image.
Terms = dict[str, jax.Array]


class MatchedLoss(Protocol):
    """The terms `class`, `l1` and `giou` of one layer, scalars.

    Args:
      predictions: `[B, Q, ...]`.
      positive: which queries stand for a box, bool `[B, Q]`.
      index: index of that box, int32 `[B, Q]`; any valid index for other queries.
      targets: the ground truth.
      denoising: whether these are denoising queries, whose boxes were not found by matching.
    """

    def __call__(
        self, predictions: Predictions, positive: jax.Array, index: jax.Array, targets: Targets, *, denoising: bool
    ) -> Terms: ...


@dataclasses.dataclass(frozen=True)
class BoxLoss:
    """The terms `l1`, on normalised cxcywh, and `giou`, on boxes in pixels, which all matched losses share."""

    l1_weight: float = 5.0
    giou_weight: float = 2.0

    def __call__(self, boxes: jax.Array, index: jax.Array, weights: jax.Array, targets: Targets, count: jax.Array) -> Terms:
        """Sums over all queries, divided by `count`.

        Args:
          boxes: predictions, cxcywh `[B, Q, 4]`.
          index: index of the ground-truth box of each query, int32 `[B, Q]`.
          weights: weight of each query, `[B, Q]`; zero for queries that stand for no box.
          targets: the ground truth.
          count: scalar.
        """
        goal = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
        l1 = jnp.where(weights[..., None] > 0, jnp.abs(boxes - goal), 0.0) * weights[..., None]
        giou = jnp.where(weights > 0, 1.0 - pixel_overlap(generalized_iou, boxes, goal, targets.sizes), 0.0) * weights
        return {"l1": self.l1_weight * jnp.sum(l1) / count, "giou": self.giou_weight * jnp.sum(giou) / count}


@dataclasses.dataclass(frozen=True)
class FocalMatchedLoss:
    """The loss of Deformable DETR and DINO: a focal class term and the box terms.

    All terms are divided by the number of positive queries, at least 1.
    """

    class_weight: float = 1.0
    boxes: BoxLoss = BoxLoss()

    def __call__(
        self, predictions: Predictions, positive: jax.Array, index: jax.Array, targets: Targets, *, denoising: bool
    ) -> Terms:
        """See `MatchedLoss`."""
        count = jnp.maximum(jnp.sum(positive), 1).astype(jnp.float32)
        focal = sigmoid_focal_loss(predictions.logits, is_class_of_box(predictions, positive, index, targets))
        focal = jnp.where(predictions.valid[..., None], focal, 0.0)
        box_terms = self.boxes(predictions.boxes, index, positive.astype(jnp.float32), targets, count)
        return {"class": self.class_weight * jnp.sum(focal) / count, **box_terms}


def is_class_of_box(predictions: Predictions, positive: jax.Array, index: jax.Array, targets: Targets) -> jax.Array:
    """Whether a class is that of the box which a query stands for: bool `[B, Q, K]`, all false for queries without a box.

    The arguments are those of `MatchedLoss`.
    """
    labels = jnp.take_along_axis(targets.labels, index, axis=1)
    return (jnp.arange(predictions.logits.shape[-1]) == labels[..., None]) & positive[..., None]
