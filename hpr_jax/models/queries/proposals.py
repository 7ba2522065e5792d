"""From the encoder's memory to the decoder's first queries: proposals, and the two ways of choosing among them."""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.heads import PredictionHead
from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.pyramid import Pyramid, pixel_centers
from hpr_jax.types import Predictions


@flax.struct.dataclass
class InitialQueries:
    """Queries in front of the first decoder layer.

    Attributes:
      content: `[B, Q, C]`.
      proposals: logits, boxes (differentiable), and which queries exist (`valid`): others are seen by none, and count in
        no loss and no detection.
      twins: bool `[B, Q]`, existing queries that start out identical.
    """

    content: jax.Array
    proposals: Predictions
    twins: jax.Array


@flax.struct.dataclass
class Tokens:
    """Tokens of the memory, all or some of them, and their anchors.

    Attributes:
      features: `[B, T, C]`.
      anchors: `[B, T, 4]`, in front of the sigmoid; infinite where the anchor comes near the border of the image.
      inside: bool `[B, T, 1]`, whether it does not.
    """

    features: jax.Array
    anchors: jax.Array
    inside: jax.Array


class ProposalGenerator(nnx.Module):
    """Anchors of each token's level, refined by a head on the memory (two-stage Deformable DETR, section A.4)."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.project = xavier_linear(channels, channels, rngs=rngs)
        self.norm = layer_norm(channels, rngs=rngs)

    @staticmethod
    def tokens(memory: Pyramid) -> Tokens:
        """All tokens, padded ones outside."""
        centers = pixel_centers(memory)
        sides = [jnp.full(h * w, _anchor_side(level)) for level, (h, w) in enumerate(memory.spatial_shapes)]
        sides = jnp.broadcast_to(jnp.concatenate(sides)[None, :, None], centers.shape)
        anchors = jnp.concatenate([centers, sides], axis=-1)
        inside = anchors_inside(memory) & memory.valid[..., None]
        safe = jnp.where(inside, anchors, 0.5)
        return Tokens(memory.tokens, jnp.where(inside, jnp.log(safe / (1.0 - safe)), jnp.inf), inside)

    def __call__(self, tokens: Tokens, head: PredictionHead) -> tuple[jax.Array, jax.Array]:
        """Logits `[B, T, K]` and boxes `[B, T, 4]` of each token.

        Tokens whose anchor comes near the border have zero memory and the box (1, 1, 1, 1); they stay candidates, all
        equal.
        """
        features = self.norm(self.project(tokens.features))
        # Once for all border tokens: row by row, equal inputs may differ in the last bit, and ties would break at random.
        border = self.norm(self.project(jnp.zeros_like(tokens.features[:1, :1])))
        return (
            jnp.where(tokens.inside, head.logits(features), head.logits(border)),
            jax.nn.sigmoid(head.offsets(features) + tokens.anchors),
        )

    def candidates(self, tokens: Tokens, head: PredictionHead) -> tuple[jax.Array, jax.Array]:
        """Logits and boxes to choose by, without gradient.

        Those of the chosen tokens are computed again, with gradient: they are few, and nothing has to be kept of the others.
        """
        generator, tokens, head = jax.lax.stop_gradient((self, tokens, head))
        return generator(tokens, head)

    def chosen(self, tokens: Tokens, head: PredictionHead, index: jax.Array, found: jax.Array) -> Predictions:
        """Proposals of the tokens `index` `[B, Q]`; zero logits and the box (.5, .5, .5, .5) where none was `found`."""
        logits, boxes = self(jax.tree.map(lambda x: rows(x, index), tokens), head)
        return Predictions(
            logits=jnp.where(found[..., None], logits, 0.0), boxes=jnp.where(found[..., None], boxes, 0.5), valid=found
        )


def anchors_inside(memory: Pyramid) -> jax.Array:
    """Whether the centre and the sides of each token's anchor lie between 0.01 and 0.99 of the image: bool `[B, S, 1]`.

    Centres are compared as integers: 0.01 < (i + 0.5) / size < 0.99 for pixel i of `size` pixels. The official code
    compares float32 quotients, with the same answer at every size below 1,400. XLA's quotients are not those: it
    multiplies by a reciprocal, and then 49.5 / 50 falls short of 0.99.
    """

    def between(length: int, size: jax.Array) -> jax.Array:
        """Of pixels along one axis: valid sizes `[B]` -> bool `[B, length]`."""
        twice_center = 2 * jnp.arange(length) + 1
        return (50 * twice_center > size[:, None]) & (50 * twice_center < 99 * size[:, None])

    inside = []
    for level, (height, width) in enumerate(memory.spatial_shapes):
        rows, columns = (between(length, memory.level_sizes[:, level, axis]) for axis, length in enumerate((height, width)))
        if not 0.01 < _anchor_side(level) < 0.99:
            rows = jnp.zeros_like(rows)
        inside.append((rows[:, :, None] & columns[:, None, :]).reshape(len(rows), height * width))
    return jnp.concatenate(inside, axis=1)[..., None]


def _anchor_side(level: int) -> float:
    """Width and height of a level's anchors, as a part of the image's: 0.05 at the finest, doubled at each next."""
    return 0.05 * 2.0**level


def best_tokens(logits: jax.Array, valid: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` tokens of the best scores, ties to the lowest index: logits `[B, S, K]`, valid `[B, S]` -> indices
    `[B, count]`, and whether there is such a token, which fails when an image has fewer."""
    # By logits: different ones may have the same probability.
    scores = jnp.where(valid, jnp.max(logits, axis=-1), -jnp.inf)
    missing = max(count - scores.shape[1], 0)
    _, index = jax.lax.top_k(jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf), count)
    index = jnp.minimum(index, scores.shape[1] - 1)
    return index, jnp.arange(count) < jnp.sum(valid, axis=1, keepdims=True)


def rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """`[B, T, ...]`, `[B, Q]` -> `[B, Q, ...]`."""
    return jnp.take_along_axis(array, index[..., None], axis=1)
