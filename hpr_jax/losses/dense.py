"""The loss of DDQ's dense queries, several of which stand for one box."""

import dataclasses

import jax
import jax.numpy as jnp

from hpr_jax.losses.functions import quality_focal_loss
from hpr_jax.losses.matched import Terms
from hpr_jax.ops.boxes import generalized_iou, iou, pixel_overlap
from hpr_jax.types import Predictions, Targets


@dataclasses.dataclass(frozen=True)
class DenseLoss:
    """The terms `class` and `giou`, weighted by how well a query suits its box (DDQ, Zhang et al. 2023, after TOOD).

    Attributes:
      positives: number of queries that are matched with one box.
      giou_weight: weight of the term `giou`.
      alpha, beta: the alignment is score^alpha IoU^beta.
    """

    positives: int = 4
    giou_weight: float = 2.0
    alpha: float = 1.0
    beta: float = 6.0

    def __call__(self, predictions: Predictions, assigned: jax.Array, targets: Targets) -> Terms:
        """The terms of one layer, `[B]` with one value for each image.

        Args:
          predictions: `[B, Q, ...]`.
          assigned: index of the box that each query stands for, or -1, int32 `[B, Q]`.
          targets: the ground truth.
        """
        positive = assigned >= 0
        index = jnp.maximum(assigned, 0)
        labels = jnp.take_along_axis(targets.labels, index, axis=1)
        boxes = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
        overlap = jax.lax.stop_gradient(pixel_overlap(iou, predictions.boxes, boxes, targets.sizes))
        score = jnp.take_along_axis(predictions.logits, labels[..., None], axis=-1)[..., 0]
        score = jax.lax.stop_gradient(jax.nn.sigmoid(score))
        alignment = score**self.alpha * overlap**self.beta

        # Of the queries of a box, the best aligned one gets the largest of their IoUs as its quality.
        stands_for_box = positive[..., None] & (index[..., None] == jnp.arange(targets.boxes.shape[1]))
        best_alignment = jnp.max(jnp.where(stands_for_box, alignment[..., None], 0.0), axis=1)
        best_overlap = jnp.max(jnp.where(stands_for_box, overlap[..., None], 0.0), axis=1)
        quality = alignment * jnp.take_along_axis(best_overlap / (best_alignment + 1e-7), index, axis=1)
        quality = jnp.where(positive, quality, 0.0)
        count = jnp.maximum(jnp.sum(quality), 1.0)

        is_class = (jnp.arange(predictions.logits.shape[-1]) == labels[..., None]) & positive[..., None]
        classes = quality_focal_loss(predictions.logits, quality[..., None], is_class)
        # Images without boxes have no dense terms. The terms of their matching queries and proposals punish detections.
        supervised = predictions.valid & jnp.any(targets.valid, axis=1, keepdims=True)
        classes = jnp.where(supervised[..., None], classes, 0.0)
        giou = (1.0 - pixel_overlap(generalized_iou, predictions.boxes, boxes, targets.sizes)) * quality
        return {
            "class": jnp.sum(classes, axis=(1, 2)) / count,
            "giou": self.giou_weight * jnp.sum(giou, axis=1) / count,
        }
