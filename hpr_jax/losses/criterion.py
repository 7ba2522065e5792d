"""All loss terms of a detector.

Terms are named `[branch/]kind/term`: kinds are `layer_i`, `proposals`, `denoising_i`, `dense_i` and `dense_proposals`;
terms `class`, `l1` and `giou`; auxiliary branches prefix their name. The loss is the sum of all terms.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hpr_jax.losses.assignment import CostWeights, Request, assign, dense_cost, matching_cost
from hpr_jax.losses.functions import quality_focal_loss, sigmoid_focal_loss
from hpr_jax.ops.boxes import cxcywh_to_xyxy, generalized_iou, iou, whwh
from hpr_jax.types import BranchPredictions, DenoisingQueries, Outputs, Predictions, Targets

Terms = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """Weights of the terms; the defaults are those of all official recipes.

    Attributes:
      class_weight, l1_weight, giou_weight: of the terms of matched and denoising queries.
      costs: of the matching.
      branch_weights: (name, weight) of each auxiliary branch.
      dense_positives: dense queries matched with one box (DDQ).
      dense_giou_weight: of the dense queries' box term.
      dense_alpha, dense_beta: a dense query's alignment is score ** alpha * IoU ** beta.
    """

    branch_weights: tuple[tuple[str, float], ...]
    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    costs: CostWeights = CostWeights()
    dense_positives: int = 4
    dense_giou_weight: float = 2.0
    dense_alpha: float = 1.0
    dense_beta: float = 6.0

    def __call__(self, outputs: Outputs, targets: Targets, denoising: DenoisingQueries | None) -> Terms:
        """-> scalars by name; those of dense queries are `[B]`, one value an image."""
        branches = {"": outputs.primary} | {f"{name}/": branch for name, branch in outputs.branches.items()}
        proposals = jax.tree.map(lambda x: x[None], outputs.proposals)
        matching = _concatenate([proposals, *(branch.matching for branch in branches.values())])
        requests = [Request(matching_cost(matching, targets, self.costs), matching.valid)]
        dense = None
        if outputs.dense_proposals is not None:
            dense_proposals = jax.tree.map(lambda x: x[None], outputs.dense_proposals)
            dense = _concatenate([dense_proposals, *(branch.dense for branch in branches.values())])
            cost = dense_cost(dense, targets, self.costs)
            requests.append(Request(cost, dense.valid, repeats=self.dense_positives))

        # Problem 0 is the encoder's; then come the layers of each branch.
        assigned = assign(requests, targets.valid)
        layers = len(outputs.primary.matching.logits)
        weights = [1.0, *(dict(self.branch_weights)[name] for name in outputs.branches)]
        terms: Terms = {}

        def add(prefix, kind, values, weight):
            """Spreads terms with a leading layer axis over names."""
            for term, value in values.items():
                for layer in range(layers):
                    terms[f"{prefix}{kind}_{layer}/{term}"] = weight * value[layer]

        def of_branch(values, branch):
            return {term: value[1 + branch * layers : 1 + (branch + 1) * layers] for term, value in values.items()}

        matched = jax.vmap(lambda p, a: self._matched_terms(p, a, targets))(matching, assigned[0])
        terms |= {f"proposals/{term}": value[0] for term, value in matched.items()}
        for index, (prefix, branch) in enumerate(branches.items()):
            add(prefix, "layer", of_branch(matched, index), weights[index])
            if denoising is not None:
                add(prefix, "denoising", self._denoising_terms(branch, denoising, targets), weights[index])
        if dense is not None:
            aligned = jax.vmap(lambda p, a: self._dense_terms(p, a, targets))(dense, assigned[1])
            terms |= {f"dense_proposals/{term}": value[0] for term, value in aligned.items()}
            for index, prefix in enumerate(branches):
                add(prefix, "dense", of_branch(aligned, index), weights[index])
        return terms

    def _matched_terms(self, predictions: Predictions, assigned: jax.Array, targets: Targets) -> Terms:
        """Terms of one layer: predictions `[B, Q, ...]`, box index or -1 `[B, Q]`."""
        positive = assigned >= 0
        return self._set_terms(predictions, positive, jnp.maximum(assigned, 0), targets)

    def _denoising_terms(self, branch: BranchPredictions, denoising: DenoisingQueries, targets: Targets) -> Terms:
        """Terms of all layers, `[layers]` each; pads of a group are trained as background."""
        return jax.vmap(lambda p: self._set_terms(p, denoising.positive, denoising.target, targets))(branch.denoising)

    def _set_terms(self, predictions: Predictions, positive: jax.Array, index: jax.Array, targets: Targets) -> Terms:
        """Focal, L1 and GIoU terms, divided by the number of positives (at least 1)."""
        count = jnp.maximum(jnp.sum(positive), 1).astype(jnp.float32)
        classes = predictions.logits.shape[-1]
        labels = jnp.take_along_axis(targets.labels, index, axis=1)
        boxes = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
        one_hot = jax.nn.one_hot(labels, classes) * positive[..., None]
        focal = jnp.where(predictions.valid[..., None], sigmoid_focal_loss(predictions.logits, one_hot), 0.0)
        l1 = jnp.where(positive[..., None], jnp.abs(predictions.boxes - boxes), 0.0)
        giou = jnp.where(positive, 1.0 - _pixel_overlap(generalized_iou, predictions.boxes, boxes, targets), 0.0)
        return {
            "class": self.class_weight * jnp.sum(focal) / count,
            "l1": self.l1_weight * jnp.sum(l1) / count,
            "giou": self.giou_weight * jnp.sum(giou) / count,
        }

    def _dense_terms(self, predictions: Predictions, assigned: jax.Array, targets: Targets) -> Terms:
        """DDQ's terms of one layer of dense queries, one value an image (DDQ appendix, after TOOD)."""
        positive = assigned >= 0
        index = jnp.maximum(assigned, 0)
        labels = jnp.take_along_axis(targets.labels, index, axis=1)
        boxes = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
        overlap = jax.lax.stop_gradient(_pixel_overlap(iou, predictions.boxes, boxes, targets))
        score = jnp.take_along_axis(predictions.logits, labels[..., None], axis=-1)[..., 0]
        score = jax.lax.stop_gradient(jax.nn.sigmoid(score))
        alignment = score**self.dense_alpha * overlap**self.dense_beta

        # Scaled so that a box's best-aligned query has the box's best IoU.
        mine = positive[..., None] & (index[..., None] == jnp.arange(targets.boxes.shape[1]))
        best_alignment = jnp.max(jnp.where(mine, alignment[..., None], 0.0), axis=1)
        best_overlap = jnp.max(jnp.where(mine, overlap[..., None], 0.0), axis=1)
        quality = alignment * jnp.take_along_axis(best_overlap / (best_alignment + 1e-7), index, axis=1)
        quality = jnp.where(positive, quality, 0.0)
        count = jnp.maximum(jnp.sum(quality), 1.0)

        is_class = (jnp.arange(predictions.logits.shape[-1]) == labels[..., None]) & positive[..., None]
        classes = quality_focal_loss(predictions.logits, quality[..., None], is_class)
        # Images without boxes are left out: their matching and encoder terms still punish false detections.
        counts = predictions.valid & jnp.any(targets.valid, axis=1, keepdims=True)
        classes = jnp.where(counts[..., None], classes, 0.0)
        giou = (1.0 - _pixel_overlap(generalized_iou, predictions.boxes, boxes, targets)) * quality
        return {
            "class": jnp.sum(classes, axis=(1, 2)) / count,
            "giou": self.dense_giou_weight * jnp.sum(giou, axis=1) / count,
        }


def _concatenate(parts: list[Predictions]) -> Predictions:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def _pixel_overlap(overlap, boxes, targets_boxes, targets: Targets):
    """Overlap in pixels, where its guard against empty boxes is negligible."""
    scale = whwh(targets.sizes)[:, None]
    return overlap(cxcywh_to_xyxy(boxes) * scale, cxcywh_to_xyxy(targets_boxes) * scale)
