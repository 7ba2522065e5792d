"""The best proposals that survive NMS, and dense ones (DDQ)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.heads import PredictionHead
from hpr_jax.models.layers import linear
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.models.queries.proposals import InitialQueries, ProposalGenerator, best_tokens, rows
from hpr_jax.ops.boxes import cxcywh_to_xyxy
from hpr_jax.ops.nms import nms_first


class DistinctQueries(nnx.Module):
    """DDQ's initial queries (Zhang et al. 2023, section 3): the best proposals that survive class-agnostic NMS, and in
    training as many and a half more, ranked by score alone, on heads of their own. Content comes from the memory.

    With fewer survivors than queries the rest is filled with zero content, zero logits and the box (.5, .5, .5, .5); these
    twins take part in everything.
    """

    def __init__(
        self,
        head: PredictionHead,
        dense_head: PredictionHead,
        channels: int,
        *,
        queries: int,
        dense_ratio: float,
        nms_threshold: float,
        rngs: nnx.Rngs,
    ):
        self.generator = ProposalGenerator(channels, rngs=rngs)
        self.head = head
        self.dense_head = dense_head
        self.content = linear(channels, channels, rngs=rngs)
        self.queries, self.dense_ratio, self.nms_threshold = queries, dense_ratio, nms_threshold

    def __call__(self, memory: Pyramid, *, with_dense: bool) -> tuple[InitialQueries, InitialQueries | None]:
        """-> matching queries, and dense ones if asked for."""
        tokens = self.generator.tokens(memory)

        def initial(head, index, found):
            content = self.content(rows(jax.lax.stop_gradient(memory.tokens), index))
            content = jnp.where(found[..., None], content, 0.0)
            return content, self.generator.chosen(tokens, head, index, found)

        logits, boxes = self.generator.candidates(tokens, self.head)
        index, found = jax.vmap(
            lambda boxes, scores, valid: nms_first(boxes, scores, valid, self.queries, self.nms_threshold)
        )(cxcywh_to_xyxy(boxes), _scores(logits), memory.valid)
        content, proposals = initial(self.head, index, found)
        matching = InitialQueries(content, proposals.replace(valid=jnp.ones_like(found)), ~found)
        if not with_dense:
            return matching, None

        logits, _ = self.generator.candidates(tokens, self.dense_head)
        count = min(int(self.queries * self.dense_ratio), logits.shape[1])
        index, found = best_tokens(logits, memory.valid, count)
        return matching, InitialQueries(*initial(self.dense_head, index, found), jnp.zeros_like(found))


def _scores(logits: jax.Array) -> jax.Array:
    """Probability of the best class: `[..., K]` -> `[...]`."""
    return jax.nn.sigmoid(jnp.max(logits, axis=-1))
