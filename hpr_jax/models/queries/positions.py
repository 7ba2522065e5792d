"""The initial queries `positions`: the best proposals, whose content is made of their boxes (two-stage Deformable DETR)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.heads import PredictionHead
from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.position import box_encoding
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.models.queries.proposals import InitialQueries, ProposalGenerator, best_tokens
from hpr_jax.types import Predictions

# The one of the classes that stands for objects of any class in the proposals.
OBJECT = 0


class PositionQueries(nnx.Module):
    """The best proposals. Content and position encoding of a query are projected from the encoding of its proposal's box,
    and the position encoding is the same in front of every layer (two-stage Deformable DETR, Zhu et al. 2021, section A.4).

    Proposals tell objects from background alone: as published, the first class stands for all of them. Their losses look at
    the proposals of all tokens, not at the chosen ones alone.

    Args:
      head: scores the proposals and moves their boxes.
      queries: how many there are.
    """

    def __init__(self, head: PredictionHead, channels: int, *, queries: int, rngs: nnx.Rngs):
        self.generator = ProposalGenerator(channels, rngs=rngs)
        self.head = head
        self.encode = xavier_linear(2 * channels, 2 * channels, rngs=rngs)
        self.encode_norm = layer_norm(2 * channels, rngs=rngs)
        self.queries = queries

    def __call__(self, memory: Pyramid, *, train: bool) -> tuple[InitialQueries, None]:
        """The matching queries, in training with the proposals of all tokens; there are no dense ones."""
        tokens = self.generator.tokens(memory)
        logits, boxes = self.generator(tokens, self.head)
        scores = jax.lax.stop_gradient(logits[..., OBJECT : OBJECT + 1])
        index, found = best_tokens(scores, memory.valid, self.queries)
        proposals = self.generator.chosen(tokens, self.head, index, found)
        # Published weights take the coordinates in the order x, y, w, h.
        encoding = box_encoding(
            jax.lax.stop_gradient(proposals.boxes)[..., jnp.array([1, 0, 2, 3])], memory.tokens.shape[-1] // 2
        )
        position, content = jnp.split(self.encode_norm(self.encode(encoding.astype(memory.tokens.dtype))), 2, axis=-1)
        return InitialQueries(
            content,
            proposals,
            duplicates=jnp.zeros_like(found),
            position=position,
            all_proposals=Predictions(logits, boxes, memory.valid) if train else None,
        ), None
