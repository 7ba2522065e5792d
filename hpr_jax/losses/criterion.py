"""All loss terms of a detector.

Terms are named `[branch/]kind/term`: kinds are `layer_i`, `proposals`, `denoising_i`, `dense_i` and `dense_proposals`;
terms `class`, `l1` and `giou`; auxiliary branches prefix their name. The loss is the sum of all terms.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hpr_jax.losses.assignment import CostWeights, Request, assign, dense_cost, matching_cost
from hpr_jax.losses.dense import DenseLoss
from hpr_jax.losses.matched import FocalMatchedLoss, MatchedLoss, Terms
from hpr_jax.types import BranchPredictions, DenoisingQueries, Outputs, Predictions, Targets


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What the terms are made of; the defaults are those of Deformable DETR and DINO.

    Attributes:
      branch_weights: (name, weight) of each auxiliary branch.
      matched: loss of matched and denoising queries.
      dense: loss of dense queries (DDQ).
      costs: of the matching.
      repeats: queries matched with one box, for each decoder layer; (): one in all of them.
      proposal_repeats: the same for the encoder's proposals.
    """

    branch_weights: tuple[tuple[str, float], ...]
    matched: MatchedLoss = FocalMatchedLoss()
    dense: DenseLoss = DenseLoss()
    costs: CostWeights = CostWeights()
    repeats: tuple[int, ...] = ()
    proposal_repeats: int = 1

    def __call__(self, outputs: Outputs, targets: Targets, denoising: DenoisingQueries | None) -> Terms:
        """-> scalars by name; those of dense queries are `[B]`, one value an image."""
        branches = {"": outputs.primary} | {f"{name}/": branch for name, branch in outputs.branches.items()}
        layers = len(outputs.primary.matching.logits)
        weights = [1.0, *(dict(self.branch_weights)[name] for name in outputs.branches)]

        # Problem 0 is the encoder's; then come the layers of each branch.
        proposals = jax.tree.map(lambda x: x[None], outputs.proposals)
        matching = _concatenate([proposals, *(branch.matching for branch in branches.values())])
        repeats = (self.proposal_repeats, *(self.repeats or (1,) * layers) * len(branches))
        requests = [Request(matching_cost(matching, targets, self.costs), matching.valid, repeats)]
        dense = None
        if outputs.dense_proposals is not None:
            dense_proposals = jax.tree.map(lambda x: x[None], outputs.dense_proposals)
            dense = _concatenate([dense_proposals, *(branch.dense for branch in branches.values())])
            cost = dense_cost(dense, targets, self.costs)
            requests.append(Request(cost, dense.valid, (self.dense.positives,) * len(cost)))
        assigned = assign(requests, targets.valid)
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
            aligned = jax.vmap(lambda p, a: self.dense(p, a, targets))(dense, assigned[1])
            terms |= {f"dense_proposals/{term}": value[0] for term, value in aligned.items()}
            for index, prefix in enumerate(branches):
                add(prefix, "dense", of_branch(aligned, index), weights[index])
        return terms

    def _matched_terms(self, predictions: Predictions, assigned: jax.Array, targets: Targets) -> Terms:
        """Terms of one layer: predictions `[B, Q, ...]`, box index or -1 `[B, Q]`."""
        return self.matched(predictions, assigned >= 0, jnp.maximum(assigned, 0), targets, denoising=False)

    def _denoising_terms(self, branch: BranchPredictions, denoising: DenoisingQueries, targets: Targets) -> Terms:
        """Terms of all layers, `[layers]` each; pads of a group are trained as background."""
        positive, index = denoising.positive, denoising.target
        return jax.vmap(lambda p: self.matched(p, positive, index, targets, denoising=True))(branch.denoising)


def _concatenate(parts: list[Predictions]) -> Predictions:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
