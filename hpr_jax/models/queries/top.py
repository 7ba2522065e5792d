"""The initial queries `top`: the best proposals by score, with learned content (Deformable DETR, DINO, Align DETR)."""

import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.heads import PredictionHead
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.models.queries.proposals import InitialQueries, ProposalGenerator, best_tokens


class TopQueries(nnx.Module):
    """The best proposals by score, whose content is learned: one vector for each rank (two-stage Deformable DETR with the
    mixed query selection of DINO, Zhang et al. 2023, section 3.4).

    Args:
      head: scores the proposals and moves their boxes.
      queries: how many there are.
    """

    def __init__(self, head: PredictionHead, channels: int, *, queries: int, rngs: nnx.Rngs):
        self.generator = ProposalGenerator(channels, rngs=rngs)
        self.head = head
        self.content = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (queries, channels)))

    def __call__(self, memory: Pyramid, *, train: bool) -> tuple[InitialQueries, None]:
        """The matching queries; there are no dense ones, in training neither."""
        tokens = self.generator.tokens(memory)
        logits, _ = self.generator.candidates(tokens, self.head)
        queries, channels = self.content.shape
        index, found = best_tokens(logits, memory.valid, queries)
        content = jnp.broadcast_to(
            self.content.get_value().astype(memory.tokens.dtype), (logits.shape[0], queries, channels)
        )
        proposals = self.generator.chosen(tokens, self.head, index, found)
        return InitialQueries(content, proposals, duplicates=jnp.zeros_like(found)), None
