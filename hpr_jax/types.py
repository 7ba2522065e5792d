"""The types that models and losses exchange. All boxes are normalised cxcywh, relative to an image's valid area."""

import flax.struct
import jax


@flax.struct.dataclass
class Targets:
    """Ground truth. It is padded to N boxes for each image; the real boxes stand first.

    Attributes:
      boxes: `[B, N, 4]`.
      labels: int32 `[B, N]`, class indices.
      valid: bool `[B, N]`, false for padding.
      sizes: int32 `[B, 2]`, valid (height, width) of each image in pixels.
    """

    boxes: jax.Array
    labels: jax.Array
    valid: jax.Array
    sizes: jax.Array


@flax.struct.dataclass
class DenoisingQueries:
    """Noisy copies of the ground truth (DINO, Zhang et al. 2023, section 3.3), in a fixed number D of slots.

    Attributes:
      labels: int32 `[B, D]`, noisy class indices.
      boxes: `[B, D, 4]`, noisy reference boxes.
      target: int32 `[B, D]`, index of the ground-truth box that a slot is a copy of.
      group: int32 `[B, D]`, number of the slot's group, whose slots see one another; -1 for unused slots.
      used: bool `[B, D]`, false for slots that no group fills: no query sees them, and they enter no loss.
      object: bool `[B, D]`, true for copies of a real box; other used slots are trained as background.
      positive: bool `[B, D]`, true for copies that are trained to find their box.
    """

    labels: jax.Array
    boxes: jax.Array
    target: jax.Array
    group: jax.Array
    used: jax.Array
    object: jax.Array
    positive: jax.Array


@flax.struct.dataclass
class Predictions:
    """What a head predicts from queries. The leading axes are the batch, or layers and batch.

    Attributes:
      logits: of the classes, `[..., Q, K]`.
      boxes: `[..., Q, 4]`.
      valid: bool `[..., Q]`, false for queries that enter no loss and no detection.
    """

    logits: jax.Array
    boxes: jax.Array
    valid: jax.Array


@flax.struct.dataclass
class BranchPredictions:
    """Predictions of all decoder layers from one branch (the primary one or an auxiliary one), by kind of query.

    Attributes:
      matching: of the matching queries, `[layers, B, M, ...]`.
      denoising: of the denoising queries, `[layers, B, D, ...]`, or None.
      dense: of the dense queries, `[layers, B, Q, ...]`, or None.
    """

    matching: Predictions
    denoising: Predictions | None
    dense: Predictions | None


@flax.struct.dataclass
class Intermediates:
    """What the detector computes on its way to the predictions, for studies of refiners.

    Attributes:
      memory: `[B, S, C]`, output of the encoder.
      spatial_shapes: static (height, width) of each level of the memory.
      level_sizes: int32 `[B, L, 2]`, valid (height, width) of each level.
      initial_content: `[B, Q, C]`, queries in front of the first decoder layer.
      reference_boxes: `[layers + 1, B, Q, 4]`, in front of each layer, and behind the last.
      hidden: `[layers, B, Q, C]`, queries behind each layer.
      normed: `[layers, B, Q, C]`, the same behind the norm that the heads of the primary branch read.
      branch_hidden, branch_normed: `[layers, branches, B, Q, C]`, the same for the auxiliary branches.
      attention_mask: bool `[layers, B, M, M]`, whether the selection of distinct queries lets a matching query see another.
    """

    memory: jax.Array
    level_sizes: jax.Array
    initial_content: jax.Array
    reference_boxes: jax.Array
    hidden: jax.Array
    normed: jax.Array
    branch_hidden: jax.Array
    branch_normed: jax.Array
    attention_mask: jax.Array
    spatial_shapes: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Outputs:
    """Everything that a detector computes.

    Attributes:
      primary: predictions of the primary branch.
      branches: predictions of the auxiliary branches, by the names of their refiners.
      proposals: that the matching queries come from, `[B, M, ...]`; or those of all tokens, where the losses look at them,
        `[B, S, ...]`.
      dense_proposals: that the dense queries come from, `[B, Q, ...]`, or None.
      intermediates: what was computed on the way.
    """

    primary: BranchPredictions
    branches: dict[str, BranchPredictions]
    proposals: Predictions
    dense_proposals: Predictions | None
    intermediates: Intermediates
