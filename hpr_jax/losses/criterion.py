"""All loss terms of a detector.

Terms are named `[branch/]kind/term`: kinds are `layer_i`, `proposals`, `denoising_i`, `dense_i` and `dense_proposals`;
terms `class`, `l1` and `giou`; auxiliary branches prefix their name. The loss is the sum of all terms.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hpr_jax.losses.dense import DenseLoss
from hpr_jax.losses.matched import FocalMatchedLoss, MatchedLoss, Terms
from hpr_jax.losses.matching import CostWeights, Request, assign, dense_cost, matching_cost
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
        """-> scalars by name; those of dense queries are `[B]`, one value an image. Calls the host, also under jit."""
        return self.terms(outputs, targets, denoising, assign(self.requests(outputs, targets), targets.valid))

    def requests(self, outputs: Outputs, targets: Targets) -> list[Request]:
        """The matching problems: of the queries that are matched, and of dense ones if there are such."""
        matching, dense = _problems(outputs)
        layers, branches = len(outputs.primary.matching.logits), 1 + len(outputs.branches)
        repeats = (self.proposal_repeats, *(self.repeats or (1,) * layers) * branches)
        requests = [Request(matching_cost(matching, targets, self.costs), matching.valid, repeats)]
        if dense is not None:
            cost = dense_cost(dense, targets, self.costs)
            requests.append(Request(cost, dense.valid, (self.dense.positives,) * len(cost)))
        return requests

    def terms(
        self, outputs: Outputs, targets: Targets, denoising: DenoisingQueries | None, assigned: Sequence[jax.Array]
    ) -> Terms:
        """The same as a call, with the solutions of `requests`: the index of each query's box or -1, int32 `[P, B, Q]`."""
        branches = {"": outputs.primary} | {f"{name}/": branch for name, branch in outputs.branches.items()}
        layers = len(outputs.primary.matching.logits)
        weights = [1.0, *(dict(self.branch_weights)[name] for name in outputs.branches)]
        matching, dense = _problems(outputs)
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


def _problems(outputs: Outputs) -> tuple[Predictions, Predictions | None]:
    """Predictions of matching queries and of dense ones with an axis of problems: 0 is the encoder's, then come the layers
    of each branch."""
    branches = [outputs.primary, *outputs.branches.values()]
    proposals, dense = jax.tree.map(lambda x: x[None], (outputs.proposals, outputs.dense_proposals))
    matching = _concatenate([proposals, *(branch.matching for branch in branches)])
    return matching, None if dense is None else _concatenate([dense, *(branch.dense for branch in branches)])


def _concatenate(parts: list[Predictions]) -> Predictions:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
