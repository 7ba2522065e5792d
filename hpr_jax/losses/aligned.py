"""The loss of Align DETR's matching and denoising queries."""

import dataclasses

import jax
import jax.numpy as jnp

from hpr_jax.losses.functions import sigmoid_cross_entropy
from hpr_jax.losses.matched import BoxLoss, Terms, is_class_of_box
from hpr_jax.ops.boxes import iou, pixel_overlap
from hpr_jax.types import Predictions, Targets


@dataclasses.dataclass(frozen=True)
class AlignedMatchedLoss:
    """Cross entropy towards a blend of score and IoU (Align DETR, Cai et al. 2023, sections 3.2 and 3.3).

    The target of a query for the class of its box is the blend t = score^alpha IoU^(1 - alpha). Matching queries of the same
    box are ranked by t; rank r, from 0 on, has the weight exp(-r / tau), which multiplies target and box terms. Denoising
    queries are not ranked. Terms are divided by the number of boxes in the batch, those of denoising queries by the number
    of positive queries; both count as at least 1.
    """

    class_weight: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0
    tau: float = 1.5
    boxes: BoxLoss = BoxLoss()

    def __call__(
        self, predictions: Predictions, positive: jax.Array, index: jax.Array, targets: Targets, *, denoising: bool
    ) -> Terms:
        """See `MatchedLoss`."""
        is_class = is_class_of_box(predictions, positive, index, targets)
        goal = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
        probability = jax.nn.sigmoid(predictions.logits)
        score = jnp.sum(jnp.where(is_class, probability, 0.0), axis=-1)
        overlap = pixel_overlap(iou, predictions.boxes, goal, targets.sizes)
        blend = jax.lax.stop_gradient(jnp.maximum(score**self.alpha * overlap ** (1 - self.alpha), 0.01))

        weights = positive.astype(jnp.float32)
        if not denoising:
            weights *= jnp.exp(-_rank(blend, positive, index) / self.tau)
        count = jnp.sum(positive if denoising else targets.valid)
        count = jnp.maximum(count, 1).astype(jnp.float32)

        goal_probability = jnp.where(is_class, (blend * weights)[..., None], 0.0)
        # As published, gradients flow through the weight of negatives, too.
        importance = jnp.where(is_class, 1.0, probability**self.gamma)
        cross_entropy = importance * sigmoid_cross_entropy(predictions.logits, goal_probability)
        cross_entropy = jnp.where(predictions.valid[..., None], cross_entropy, 0.0)
        box_terms = self.boxes(predictions.boxes, index, weights, targets, count)
        return {"class": self.class_weight * jnp.sum(cross_entropy) / count, **box_terms}


def _rank(value: jax.Array, positive: jax.Array, index: jax.Array) -> jax.Array:
    """How many positive queries of the same box come before a query: those with a larger value, or with the same value and
    a lower index. All are `[B, Q]`."""
    place = jnp.arange(value.shape[-1])
    larger = value[:, None, :] > value[:, :, None]
    earlier = (value[:, None, :] == value[:, :, None]) & (place[None, :] < place[:, None])
    rivals = positive[:, None, :] & (index[:, None, :] == index[:, :, None])
    return jnp.sum(rivals & (larger | earlier), axis=-1)
