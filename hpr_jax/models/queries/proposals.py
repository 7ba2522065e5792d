"""Proposals: logits and a box predicted from each token of the memory, and the choice of the best of them."""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.heads import PredictionHead
from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.pyramid import Pyramid, join_levels, pixel_centers
from hpr_jax.types import Predictions


@flax.struct.dataclass
class InitialQueries:
    """Queries in front of the first decoder layer.

    Attributes:
      content: `[B, Q, C]`.
      proposals: `[B, Q, ...]`, the proposals that the queries come from, differentiable. Queries that are not valid there
        are seen by none, and enter no loss and no detection.
      duplicates: bool `[B, Q]`, valid queries that start out identical.
      position: `[B, Q, C]`, the position encoding of the queries in front of every layer; None: it is made of their boxes,
        which layers move.
      all_proposals: `[B, T, ...]`, the proposals of all tokens, where the losses look at them.
    """

    content: jax.Array
    proposals: Predictions
    duplicates: jax.Array
    position: jax.Array | None = None
    all_proposals: Predictions | None = None


@flax.struct.dataclass
class Tokens:
    """T tokens of the memory, all or some of them, each with an anchor: the box that its proposal starts from.

    Attributes:
      features: `[B, T, C]`.
      anchors: `[B, T, 4]`, cxcywh in front of the sigmoid; infinite where not `inside`.
      inside: bool `[B, T, 1]`, false for anchors that come near the border of the image, and for padded tokens.
    """

    features: jax.Array
    anchors: jax.Array
    inside: jax.Array


class ProposalGenerator(nnx.Module):
    """Predicts a proposal from each token of the memory: a head moves the token's anchor (two-stage Deformable DETR, Zhu et
    al. 2021, section A.4). An anchor is a square at the token's pixel, whose side depends on the level alone."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.project = xavier_linear(channels, channels, rngs=rngs)
        self.norm = layer_norm(channels, rngs=rngs)

    @staticmethod
    def tokens(memory: Pyramid) -> Tokens:
        """All tokens of the memory and their anchors."""
        centers = pixel_centers(memory)
        side_by_level = [jnp.full((1, h * w, 1), _anchor_side(level)) for level, (h, w) in enumerate(memory.spatial_shapes)]
        sides = jnp.broadcast_to(join_levels(side_by_level), centers.shape)
        anchors = jnp.concatenate([centers, sides], axis=-1)
        inside = anchors_inside(memory) & memory.valid[..., None]
        safe = jnp.where(inside, anchors, 0.5)
        return Tokens(memory.tokens, jnp.where(inside, jnp.log(safe / (1.0 - safe)), jnp.inf), inside)

    def __call__(self, tokens: Tokens, head: PredictionHead) -> tuple[jax.Array, jax.Array]:
        """The proposal of each token: logits `[B, T, K]` and normalised cxcywh boxes `[B, T, 4]`.

        Tokens that are not `inside` all have the same proposal, the logits of a zero token and the box (1, 1, 1, 1). Those
        of them that are no padding can be chosen nevertheless, as published.
        """
        with jax.named_scope("generator"):
            features = self.norm(self.project(tokens.features))
            # Computed once for all of them: row by row, the results of equal inputs may differ in the last bit, and ties
            # would break at random.
            border = self.norm(self.project(jnp.zeros_like(tokens.features[:1, :1])))
        with jax.named_scope("head"):
            return (
                jnp.where(tokens.inside, head.logits(features), head.logits(border)),
                jax.nn.sigmoid(head.offsets(features) + tokens.anchors),
            )

    def candidates(self, tokens: Tokens, head: PredictionHead) -> tuple[jax.Array, jax.Array]:
        """The proposals to choose among, without gradient: logits `[B, T, K]` and boxes `[B, T, 4]`.

        `chosen` computes those of the chosen tokens again, with gradient. They are few, and so nothing of the others has to
        be saved for the backward pass.
        """
        generator, tokens, head = jax.lax.stop_gradient((self, tokens, head))
        return generator(tokens, head)

    def chosen(self, tokens: Tokens, head: PredictionHead, index: jax.Array, found: jax.Array) -> Predictions:
        """Proposals of the chosen tokens, differentiable.

        Args:
          index: int32 `[B, Q]`, the chosen ones of the T tokens.
          found: bool `[B, Q]`, false where there was no token to choose: the logits are zero there, and the box is
            (.5, .5, .5, .5).

        Returns:
          `[B, Q, ...]`, valid where `found`.
        """
        logits, boxes = self(jax.tree.map(lambda x: take_rows(x, index), tokens), head)
        return Predictions(
            logits=jnp.where(found[..., None], logits, 0.0), boxes=jnp.where(found[..., None], boxes, 0.5), valid=found
        )


def anchors_inside(memory: Pyramid) -> jax.Array:
    """Whether the centre and the sides of each token's anchor lie between 0.01 and 0.99 of the image: bool `[B, S, 1]`.

    Centres are compared as integers: 0.01 < (i + 0.5) / size < 0.99 for pixel i of `size` pixels. The official code
    compares float32 quotients, with the same answer at every size below 1,400. XLA's quotients would give other answers: it
    multiplies by a reciprocal, and then 49.5 / 50 falls short of 0.99.
    """

    def between(length: int, size: jax.Array) -> jax.Array:
        """Which of `length` pixels along one axis are inside, given valid sizes `[B]`: bool `[B, length]`."""
        twice_center = 2 * jnp.arange(length) + 1
        return (50 * twice_center > size[:, None]) & (50 * twice_center < 99 * size[:, None])

    inside = []
    for level, (height, width) in enumerate(memory.spatial_shapes):
        rows, columns = (between(length, memory.level_sizes[:, level, axis]) for axis, length in enumerate((height, width)))
        if not 0.01 < _anchor_side(level) < 0.99:
            rows = jnp.zeros_like(rows)
        inside.append((rows[:, :, None] & columns[:, None, :]).reshape(rows.shape[0], height * width))
    return join_levels(inside)[..., None]


def _anchor_side(level: int) -> float:
    """Width and height of a level's anchors, relative to the image's: 0.05 on the finest level, then doubled each time."""
    return 0.05 * 2.0**level


def best_tokens(logits: jax.Array, valid: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The tokens of an image with the best scores, the lower index first among equal scores.

    Args:
      logits: `[B, S, K]`; a token's score is its largest logit.
      valid: bool `[B, S]`; other tokens are not chosen.

    Returns:
      Indices int32 `[B, count]` by falling score, and bool `[B, count]`, false where an image has no more valid tokens.
    """
    # Compared as logits, since different logits may have the same probability in float32.
    scores = jnp.where(valid, jnp.max(logits, axis=-1), -jnp.inf)
    missing = max(count - scores.shape[1], 0)
    _, index = jax.lax.top_k(jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf), count)
    index = jnp.minimum(index, scores.shape[1] - 1)
    return index, jnp.arange(count) < jnp.sum(valid, axis=1, keepdims=True)


def take_rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index` `[B, Q]` of each image's array `[B, T, n]` -> `[B, Q, n]`."""
    return jnp.take_along_axis(array, index[..., None], axis=1)
