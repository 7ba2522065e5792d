"""The initial queries `distinct`: the best proposals that survive NMS, and dense queries beside them (DDQ)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.heads import PredictionHead
from hpr_jax.models.layers import linear
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.models.queries.proposals import InitialQueries, ProposalGenerator, best_tokens, take_rows
from hpr_jax.ops.boxes import cxcywh_to_xyxy
from hpr_jax.ops.nms import nms_first


class DistinctQueries(nnx.Module):
    """DDQ's initial queries (Zhang et al. 2023, section 3): the matching queries are the best proposals that survive
    class-agnostic NMS. The dense queries, in training alone, are the best proposals by the score of a head of their own,
    without NMS. The content of both comes from the memory.

    Where fewer proposals survive than there are matching queries, the remaining queries are duplicates: they all have zero
    content, zero logits and the box (.5, .5, .5, .5), and take part in everything.

    Args:
      head: scores the proposals of the matching queries and moves their boxes.
      dense_head: the same for the dense queries.
      queries: number of matching queries.
      dense_ratio: number of dense queries per matching query.
      nms_threshold: IoU above which a proposal suppresses a worse one.
      implementation: of NMS.
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
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.generator = ProposalGenerator(channels, rngs=rngs)
        self.head = head
        self.dense_head = dense_head
        self.content = linear(channels, channels, rngs=rngs)
        self.queries, self.dense_ratio = queries, dense_ratio
        self.nms_threshold, self.implementation = nms_threshold, implementation

    def best_distinct(self, boxes: jax.Array, scores: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The proposals of one image that become matching queries, see `nms_first`."""
        return nms_first(boxes, scores, valid, self.queries, self.nms_threshold, implementation=self.implementation)

    def __call__(self, memory: Pyramid, *, train: bool) -> tuple[InitialQueries, InitialQueries | None]:
        """The matching queries, and in training the dense ones."""
        tokens = self.generator.tokens(memory)

        def content_and_proposals(head, index, found):
            content = jax.named_scope("content")(self.content)(take_rows(jax.lax.stop_gradient(memory.tokens), index))
            content = jnp.where(found[..., None], content, 0.0)
            return content, self.generator.chosen(tokens, head, index, found)

        logits, boxes = self.generator.candidates(tokens, self.head)
        index, found = jax.vmap(self.best_distinct)(cxcywh_to_xyxy(boxes), _scores(logits), memory.valid)
        content, proposals = content_and_proposals(self.head, index, found)
        proposals = dataclasses.replace(proposals, valid=jnp.ones_like(found))
        matching = InitialQueries(content, proposals, duplicates=~found)
        if not train:
            return matching, None

        logits, _ = self.generator.candidates(tokens, self.dense_head)
        count = min(int(self.queries * self.dense_ratio), logits.shape[1])
        index, found = best_tokens(logits, memory.valid, count)
        content, proposals = content_and_proposals(self.dense_head, index, found)
        return matching, InitialQueries(content, proposals, duplicates=jnp.zeros_like(found))


def _scores(logits: jax.Array) -> jax.Array:
    """Probability of the best class: `[..., K]` -> `[...]`."""
    return jax.nn.sigmoid(jnp.max(logits, axis=-1))
