"""All loss terms of a detector; the loss is their sum.

A term is named `kind/term`, or `branch/kind/term` in an auxiliary branch. Kinds are `layer_i`, `proposals`, `denoising_i`,
`dense_i` and `dense_proposals`, where i is the index of a layer; terms are `class`, `l1` and `giou`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hpr_jax.losses.dense import DenseLoss
from hpr_jax.losses.matched import FocalMatchedLoss, MatchedLoss, Terms
from hpr_jax.losses.matching import CostWeights, Request, dense_cost, matching_cost
from hpr_jax.types import BranchPredictions, DenoisingQueries, Outputs, Predictions, Targets


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What the loss terms are made of. The defaults are those of Deformable DETR and DINO.

    The matching stands between two steps: `requests` makes its problems on the device, the caller solves them on the host
    (`matching.solve_on_host`), and `terms` takes the solutions.

    Attributes:
      branch_weights: (name, weight) of each auxiliary branch.
      matched: loss of matching and denoising queries.
      dense: loss of dense queries, which only DDQ has.
      costs: weights of the matching cost.
      repeats: number of queries that are matched with one box, for each decoder layer; (): one in every layer.
      proposal_repeats: the same number for the encoder's proposals.
      proposals_of_objects: whether there are proposals of all tokens, in which the first class stands for objects of any
        class (two-stage Deformable DETR).
    """

    branch_weights: tuple[tuple[str, float], ...]
    matched: MatchedLoss = FocalMatchedLoss()
    dense: DenseLoss = DenseLoss()
    costs: CostWeights = CostWeights()
    repeats: tuple[int, ...] = ()
    proposal_repeats: int = 1
    proposals_of_objects: bool = False

    def requests(self, outputs: Outputs, targets: Targets) -> list[Request]:
        """The matching problems: a request for proposals, one for matching queries, and one for dense queries, if any. If
        there are as many proposals as matching queries, they share a request."""
        proposals, matching, dense = _problems(outputs)
        layers, branches = len(outputs.primary.matching.logits), 1 + len(outputs.branches)
        repeats = (self.repeats or (1,) * layers) * branches
        requests = []
        if self.proposals_of_objects:
            cost = matching_cost(proposals, _of_objects(targets), self.costs)
            requests.append(Request(cost, proposals.valid, (self.proposal_repeats,)))
        else:
            matching, repeats = _concatenate([proposals, matching]), (self.proposal_repeats, *repeats)
        requests.append(Request(matching_cost(matching, targets, self.costs), matching.valid, repeats))
        if dense is not None:
            cost = dense_cost(dense, targets, self.costs)
            requests.append(Request(cost, dense.valid, (self.dense.positives,) * len(cost)))
        return requests

    def terms(
        self, outputs: Outputs, targets: Targets, denoising: DenoisingQueries | None, assigned: Sequence[jax.Array]
    ) -> Terms:
        """All loss terms by name: scalars, those of dense queries `[B]` with one value for each image.

        Args:
          outputs: what the detector computed.
          targets: the ground truth.
          denoising: the denoising queries that the detector was given, or None.
          assigned: solutions of `requests`, for each the index of every query's box or -1, int32 `[P, B, Q]`.
        """
        branches = {"": outputs.primary} | {f"{name}/": branch for name, branch in outputs.branches.items()}
        layers = len(outputs.primary.matching.logits)
        weights = [1.0, *(dict(self.branch_weights)[name] for name in outputs.branches)]
        proposals, matching, dense = _problems(outputs)
        terms: Terms = {}

        def add(prefix: str, kind: str, values: Terms, weight: float) -> None:
            """Adds weighted terms of all layers, `[layers, ...]`, one name for each layer."""
            for term, value in values.items():
                for layer in range(layers):
                    terms[f"{prefix}{kind}_{layer}/{term}"] = weight * value[layer]

        def of_branch(values: Terms, branch: int) -> Terms:
            """The terms of one branch, `[layers, ...]`, of those of all problems, `[P, ...]`."""
            return {term: value[branch * layers : (branch + 1) * layers] for term, value in values.items()}

        def matched_terms(predictions: Predictions, assigned: jax.Array, targets: Targets) -> Terms:
            return jax.vmap(lambda p, a: self._matched_terms(p, a, targets))(predictions, assigned)

        if self.proposals_of_objects:
            of_proposals = matched_terms(proposals, assigned[0], _of_objects(targets))
            matched = matched_terms(matching, assigned[1], targets)
        else:
            of_proposals = matched_terms(_concatenate([proposals, matching]), assigned[0], targets)
            matched = {term: value[1:] for term, value in of_proposals.items()}
        terms |= {f"proposals/{term}": value[0] for term, value in of_proposals.items()}
        for index, (prefix, branch) in enumerate(branches.items()):
            add(prefix, "layer", of_branch(matched, index), weights[index])
            if denoising is not None:
                add(prefix, "denoising", self._denoising_terms(branch, denoising, targets), weights[index])
        if dense is not None:
            aligned = jax.vmap(lambda p, a: self.dense(p, a, targets))(dense, assigned[-1])
            terms |= {f"dense_proposals/{term}": value[0] for term, value in aligned.items()}
            aligned = {term: value[1:] for term, value in aligned.items()}
            for index, prefix in enumerate(branches):
                add(prefix, "dense", of_branch(aligned, index), weights[index])
        return terms

    def _matched_terms(self, predictions: Predictions, assigned: jax.Array, targets: Targets) -> Terms:
        """Terms of one layer: predictions `[B, Q, ...]`, index of each query's box or -1 `[B, Q]` -> scalars."""
        return self.matched(predictions, assigned >= 0, jnp.maximum(assigned, 0), targets, denoising=False)

    def _denoising_terms(self, branch: BranchPredictions, denoising: DenoisingQueries, targets: Targets) -> Terms:
        """Terms of all layers, each `[layers]`. Slots that only pad their group are trained as background."""
        positive, index = denoising.positive, denoising.target
        return jax.vmap(lambda p: self.matched(p, positive, index, targets, denoising=True))(branch.denoising)


def _of_objects(targets: Targets) -> Targets:
    """The ground truth with the first class for all objects."""
    return dataclasses.replace(targets, labels=jnp.zeros_like(targets.labels))


def _problems(outputs: Outputs) -> tuple[Predictions, Predictions, Predictions | None]:
    """The encoder's proposals; the predictions of matching queries; and those of dense queries, if any, behind the dense
    proposals. All have a leading axis of problems: the layers of the primary branch and of each auxiliary branch."""
    branches = [outputs.primary, *outputs.branches.values()]
    proposals, dense = jax.tree.map(lambda x: x[None], (outputs.proposals, outputs.dense_proposals))
    matching = _concatenate([branch.matching for branch in branches])
    if dense is not None:
        dense = _concatenate([dense, *(branch.dense for branch in branches if branch.dense is not None)])
    return proposals, matching, dense


def _concatenate(parts: list[Predictions]) -> Predictions:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
