"""What models and losses exchange. All boxes are normalised cxcywh, relative to an image's valid area."""

import flax.struct
import jax


@flax.struct.dataclass
class Targets:
    """Ground truth, padded to N boxes an image; the real boxes come first.

    Attributes:
      boxes: `[B, N, 4]`.
      labels: int32 `[B, N]`, class indices.
      valid: bool `[B, N]`, false where padded.
      sizes: int32 `[B, 2]`, valid (height, width) of each image in pixels.
    """

    boxes: jax.Array
    labels: jax.Array
    valid: jax.Array
    sizes: jax.Array


@flax.struct.dataclass
class DenoisingQueries:
    """Noisy copies of the ground truth in D fixed slots (DINO, Zhang et al. 2023, section 3.3).

    Attributes:
      labels: int32 `[B, D]`, noisy class indices.
      boxes: `[B, D, 4]`, noisy reference boxes.
      target: int32 `[B, D]`, index of the box that a slot is a copy of.
      group: int32 `[B, D]`; slots of a group see one another.
      used: bool `[B, D]`, false for slots that no group fills: nothing attends to them, no loss counts them.
      object: bool `[B, D]`, true for copies of a real box; other used slots are trained as background.
      positive: bool `[B, D]`, true for the copies that shall find their box.
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
    """Class logits `[..., Q, K]`, boxes `[..., Q, 4]`, and which queries count, bool `[..., Q]`.

    Attributes:
      logits, boxes: leading axes (layers and) batch.
      valid: the same leading axes.
    """

    logits: jax.Array
    boxes: jax.Array
    valid: jax.Array


@flax.struct.dataclass
class BranchPredictions:
    """Predictions of all decoder layers from one branch (the primary one or an auxiliary one), by kind of query.

    Attributes:
      matching: of the queries that are matched with the ground truth.
      denoising: of the denoising queries, or None.
      dense: of the dense queries, or None.
    """

    matching: Predictions
    denoising: Predictions | None
    dense: Predictions | None


@flax.struct.dataclass
class Intermediates:
    """For whoever studies refiners.

    Attributes:
      memory: `[B, S, C]`, output of the encoder.
      spatial_shapes: static (height, width) of each level of the memory.
      level_sizes: int32 `[B, L, 2]`, valid (height, width) of each level.
      initial_content: `[B, Q, C]`, queries in front of the first decoder layer.
      reference_boxes: `[layers + 1, B, Q, 4]`, in front of each layer, and behind the last.
      hidden: `[layers, B, Q, C]`, primary branch behind each layer.
      normed: the same behind the norm that the heads read.
      branch_hidden, branch_normed: `[layers, branches, B, Q, C]`, the same for the auxiliary branches.
      attention_mask: bool `[layers, B, M, M]`, which matching queries see which, in each layer.
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
      branches: name of each auxiliary branch -> its predictions.
      proposals: of the encoder, for the initial queries.
      dense_proposals: of the encoder, for the dense queries, or None.
      intermediates: hidden states and masks.
    """

    primary: BranchPredictions
    branches: dict[str, BranchPredictions]
    proposals: Predictions
    dense_proposals: Predictions | None
    intermediates: Intermediates
