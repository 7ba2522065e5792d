"""Costs, losses and their divisors against values worked out by hand or by a few lines of NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hpr_jax.losses import criterion as criterion_module
from hpr_jax.losses.aligned import AlignedMatchedLoss
from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.dense import DenseLoss
from hpr_jax.losses.functions import quality_focal_loss
from hpr_jax.losses.matched import FocalMatchedLoss
from hpr_jax.losses.matching import CostWeights, dense_cost, focal_cost, matching_cost, solve_on_host
from hpr_jax.types import BranchPredictions, DenoisingQueries, Intermediates, Outputs, Predictions, Targets

# The logit of the probability 0.5 is 0, of 0.8 log 4, of 0.9 log 9.
HALF, FOUR_FIFTHS, NINE_TENTHS = 0.0, np.log(4.0), np.log(9.0)
# In every image of these tests the object fills a box of this size; a box moved by 0.1 in x has IoU 0.3 / 0.5 = 0.6.
BOX = (0.5, 0.5, 0.4, 0.4)


def predictions(logits, boxes, valid=None):
    """From nested lists `[B, Q, K]`, `[B, Q, 4]` and `[B, Q]`."""
    logits, boxes = np.asarray(logits, np.float32), np.asarray(boxes, np.float32)
    return Predictions(logits, boxes, np.ones(logits.shape[:-1], bool) if valid is None else np.asarray(valid))


def targets(boxes, labels, valid, sizes=(100, 200)):
    """From nested lists `[B, N, 4]`, `[B, N]` and `[B, N]`; all images have one size."""
    sizes = np.tile(np.array(sizes, np.int32), (len(labels), 1))
    return Targets(np.asarray(boxes, np.float32), np.asarray(labels, np.int32), np.asarray(valid), sizes)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def cross_entropy(p, goal):
    return -(goal * np.log(p) + (1 - goal) * np.log(1 - p))


def narrowed(share):
    """`BOX` with only so much of its width, which is also its IoU with `BOX`."""
    return (0.5, 0.5, 0.4 * share, 0.4)


class TestCosts:
    """One query, two boxes and two classes."""

    matching = staticmethod(jax.jit(functools.partial(matching_cost, weights=CostWeights())))
    dense = staticmethod(jax.jit(functools.partial(dense_cost, weights=CostWeights())))

    @staticmethod
    def query(logits, box):
        return predictions([[[logits]]], [[[box]]])

    @pytest.mark.parametrize(
        "logit",
        [
            -40.0,
            # In compiled programs 1 - p + 1e-12 becomes 1 - p, whose logarithm is infinite.
            40.0,
        ],
    )
    def test_logarithms_are_guarded_by_1e_12(self, logit):
        """Otherwise the costs were 10 and -30."""
        cost = jax.jit(focal_cost)(np.full((1, 1), logit, np.float32), np.zeros(1, np.int32))
        expected = {-40.0: 0.25 * np.log(1e12), 40.0: -0.75 * np.log(1e12)}
        np.testing.assert_allclose(cost, [[expected[logit]]], rtol=1e-5)

    def test_matching_takes_l1_on_centre_and_size(self):
        """The query lies 0.1 right of the first box and 0.1 below the second: 0.1 in L1, 0.6 in IoU, and nothing of the
        enclosing box is in neither. It is sure of class 1, which the second box has."""
        boxes = [[BOX, (0.6, 0.4, 0.4, 0.4)]]
        query = self.query((-FOUR_FIFTHS, FOUR_FIFTHS), (0.6, 0.5, 0.4, 0.4))
        cost = self.matching(query, targets(boxes, [[0, 1]], [[True, True]]))
        dear = 0.25 * 0.64 * -np.log(0.2) + 0.75 * 0.04 * np.log(0.8)
        cheap = 0.25 * 0.04 * -np.log(0.8) + 0.75 * 0.64 * np.log(0.2)
        expected = [2 * focal + 5 * 0.1 - 2 * 0.6 for focal in (dear, cheap)]
        np.testing.assert_allclose(cost[0, 0, :, 0], expected, rtol=1e-4)

    def test_dense_cost_applies_the_sigmoid_twice_and_l1_to_corners(self):
        """Two of the corners' coordinates are 0.1 off."""
        boxes = [[BOX, (0.6, 0.4, 0.4, 0.4)]]
        cost = self.dense(self.query((HALF, HALF), (0.6, 0.5, 0.4, 0.4)), targets(boxes, [[0, 1]], [[True, True]]))
        p = sigmoid(0.5)
        focal = -0.25 * (1 - p) ** 2 * np.log(p) + 0.75 * p**2 * np.log(1 - p)
        np.testing.assert_allclose(cost[0, 0, :, 0], [2 * focal + 5 * 0.2 - 2 * 0.6] * 2, rtol=1e-4)

    @pytest.mark.parametrize("kind", ["matching", "dense"])
    def test_overlaps_are_taken_in_pixels(self, kind):
        """The area of half a pixel, normalised, would be smaller than the guard against empty boxes."""
        half_a_pixel = (0.5, 0.5, 0.0005, 0.0005)
        elsewhere = (0.1, 0.1, 0.1, 0.1)
        goal = targets([[half_a_pixel, elsewhere]], [[0, 0]], [[True, True]], sizes=(1000, 1000))
        cost = getattr(self, kind)
        exact = float(cost(self.query((HALF, HALF), half_a_pixel), goal)[0, 0, 0, 0])
        large = float(cost(self.query((HALF, HALF), elsewhere), goal)[0, 0, 1, 0])
        assert exact == pytest.approx(large, abs=1e-3)


class TestAssignment:
    def test_queries_of_a_box_are_counted_among_those_that_count(self):
        """Five of eight queries count, and two of three boxes are real: two queries a box, not four."""
        cost, valid = np.zeros((1, 1, 3, 8), np.float32), np.array([[[True, False] * 3 + [True, True]]])
        (assigned,) = solve_on_host([cost], [valid], np.array([[True, True, False]]), [(4,)])
        assert np.bincount(assigned[assigned >= 0]).tolist() == [2, 2]
        assert np.all(assigned[~valid] == -1)

    def test_more_boxes_than_queries(self):
        """Only as many boxes are found as queries count, the cheapest: boxes 2 and 0."""
        cost = np.array([[[[5.0, 2.0, 0.0], [9.0, 9.0, 0.0], [1.0, 4.0, 0.0]]]], np.float32)
        (assigned,) = solve_on_host([cost], [np.array([[[True, True, False]]])], np.ones((1, 3), bool), [(4,)])
        assert assigned[0, 0].tolist() == [2, 0, -1]


def stub_matched(predictions, positive, index, targets, *, denoising):
    """Terms that tell what a layer's loss was given."""
    return {
        "class": jnp.mean(predictions.logits),
        "l1": jnp.sum(jnp.where(positive, 10 + index, 0)).astype(jnp.float32),
        "giou": jnp.float32(denoising),
    }


class StubDense(DenseLoss):
    """Terms that tell what a layer's loss was given."""

    def __call__(self, predictions, assigned, targets):
        return {"class": jnp.mean(predictions.logits, axis=(1, 2)), "giou": jnp.sum(assigned, axis=1).astype(jnp.float32)}


class TestCriterion:
    """One image, two layers, the branches `a` and `b`. Every prediction is a number that names its place: tens for the
    branch, ones for the layer, and hundreds for the kind of query."""

    CRITERION = Criterion(branch_weights=(("b", 0.25), ("a", 0.5)))
    STUBBED = dataclasses.replace(CRITERION, matched=stub_matched, dense=StubDense())
    TARGETS = targets([[BOX, BOX]], [[0, 0]], [[True, True]])

    @staticmethod
    def outputs():
        def numbered(number, queries):
            logits, boxes = np.full((1, queries, 1), number, np.float32), np.full((1, queries, 4), 0.5, np.float32)
            return Predictions(logits, boxes, np.ones((1, queries), bool))

        def layers(number, queries):
            return jax.tree.map(lambda *xs: np.stack(xs), numbered(number, queries), numbered(number + 1, queries))

        def branch(number):
            return BranchPredictions(layers(number, 3), layers(100 + number, 2), layers(200 + number, 4))

        return Outputs(
            primary=branch(10),
            branches={"a": branch(20), "b": branch(30)},
            proposals=numbered(1, 3),
            dense_proposals=numbered(201, 4),
            intermediates=Intermediates(*[np.zeros(0)] * 9, spatial_shapes=()),
        )

    def terms(self):
        nothing = np.zeros((1, 2), np.float32)
        denoising = DenoisingQueries(
            labels=nothing,
            boxes=nothing,
            target=np.array([[1, 0]]),
            group=nothing,
            used=nothing,
            object=nothing,
            positive=np.array([[True, False]]),
        )
        # Problem p matches p + 1 queries with boxes of the index p; its other queries have none.
        problems = np.arange(7)[:, None, None]
        matching = np.where(np.arange(3) < problems + 1, problems, -1)
        dense = np.broadcast_to(problems, (7, 1, 4))
        terms = jax.jit(self.STUBBED.terms)(self.outputs(), self.TARGETS, denoising, [matching, dense])
        return {name: float(np.squeeze(value)) for name, value in terms.items()}

    def test_every_term_is_of_its_own_layer_and_has_its_branch_s_weight(self):
        """The proposals' terms and the primary branch's count in full, those of a branch by its weight."""
        classes = {name.removesuffix("/class"): v for name, v in self.terms().items() if name.endswith("/class")}
        assert classes == {
            "proposals": 1.0,
            "layer_0": 10.0,
            "layer_1": 11.0,
            "a/layer_0": 0.5 * 20,
            "a/layer_1": 0.5 * 21,
            "b/layer_0": 0.25 * 30,
            "b/layer_1": 0.25 * 31,
            "denoising_0": 110.0,
            "denoising_1": 111.0,
            "a/denoising_0": 0.5 * 120,
            "a/denoising_1": 0.5 * 121,
            "b/denoising_0": 0.25 * 130,
            "b/denoising_1": 0.25 * 131,
            "dense_proposals": 201.0,
            "dense_0": 210.0,
            "dense_1": 211.0,
            "a/dense_0": 0.5 * 220,
            "a/dense_1": 0.5 * 221,
            "b/dense_0": 0.25 * 230,
            "b/dense_1": 0.25 * 231,
        }

    def test_every_layer_has_its_own_solution(self):
        """Problems in turn: proposals, the primary branch's layers, those of `a`, those of `b`."""
        terms = self.terms()
        weights = {"proposals": 1.0, "layer_0": 1.0, "layer_1": 1.0, "a/layer_0": 0.5, "a/layer_1": 0.5}
        weights |= {"b/layer_0": 0.25, "b/layer_1": 0.25}
        for problem, (name, weight) in enumerate(weights.items()):
            assert terms[f"{name}/l1"] == weight * min(problem + 1, 3) * (10 + problem), name
            assert terms[f"{name}/giou"] == 0.0, name
            dense = name.replace("layer", "dense") if "layer" in name else f"dense_{name}"
            assert terms[f"{dense}/giou"] == weight * 4 * problem, dense

    def test_denoising_queries_stand_for_the_boxes_that_they_copy(self):
        """The first slot is positive, a copy of box 1."""
        terms = self.terms()
        for branch, weight in (("", 1.0), ("a/", 0.5), ("b/", 0.25)):
            for layer in range(2):
                assert terms[f"{branch}denoising_{layer}/l1"] == weight * 11
                assert terms[f"{branch}denoising_{layer}/giou"] == weight, "the loss is to know that they are not matched"

    def test_what_is_asked_of_the_solver(self):
        """Branches repeat the layers' numbers, not the proposals'; dense queries have four a box."""
        criterion = dataclasses.replace(self.CRITERION, repeats=(3, 2), proposal_repeats=4)
        matching, dense = jax.eval_shape(criterion.requests, self.outputs(), self.TARGETS)
        assert matching.repeats == (4, 3, 2, 3, 2, 3, 2)
        assert dense.repeats == (4,) * 7
        assert matching.cost.shape == (7, 1, 2, 3)
        assert dense.cost.shape == (7, 1, 2, 4)
        plain = dataclasses.replace(criterion, repeats=(), proposal_repeats=1)
        assert jax.eval_shape(plain.requests, self.outputs(), self.TARGETS)[0].repeats == (1,) * 7

    def test_the_solver_s_problems_are_in_the_terms_order(self, monkeypatch):
        """Costs are in place of the solver's; they are the logits, which name their place."""
        monkeypatch.setattr(criterion_module, "matching_cost", lambda predictions, *_: predictions.logits)
        monkeypatch.setattr(criterion_module, "dense_cost", lambda predictions, *_: predictions.logits)
        matching, dense = self.CRITERION.requests(self.outputs(), self.TARGETS)
        assert matching.cost[:, 0, 0, 0].tolist() == [1, 10, 11, 20, 21, 30, 31]
        assert dense.cost[:, 0, 0, 0].tolist() == [201, 210, 211, 220, 221, 230, 231]


@functools.partial(jax.jit, static_argnums=0, static_argnames="denoising")
def matched(loss, predictions, positive, index, targets, *, denoising=False):
    return loss(predictions, positive, index, targets, denoising=denoising)


class TestFocalMatchedLoss:
    def test_values_and_divisor(self):
        """Three queries in two images are matched, and everything is divided by three. The target of a match is 1."""
        found = predictions(
            [[[FOUR_FIFTHS, HALF], [HALF, HALF], [HALF, HALF]], [[HALF, HALF], [HALF, HALF], [HALF, HALF]]],
            [[(0.6, 0.5, 0.4, 0.4), BOX, BOX], [narrowed(0.5), BOX, BOX]],
        )
        positive = jnp.array([[True, False, True], [True, False, False]])
        index = jnp.array([[1, 0, 0], [0, 0, 0]])
        goal = targets([[BOX, BOX], [BOX, BOX]], [[1, 0], [1, 0]], [[True, True], [True, False]])
        terms = matched(FocalMatchedLoss(), found, positive, index, goal)
        # One logit of four fifths and two of one half match; nine of one half are background.
        match = 0.25 * (0.2**2 * -np.log(0.8) + 2 * 0.5**2 * np.log(2))
        assert terms["class"] == pytest.approx((match + 9 * 0.75 * 0.25 * np.log(2)) / 3, rel=1e-5)
        assert terms["l1"] == pytest.approx(5 * (0.1 + 0.2) / 3, rel=1e-5)
        assert terms["giou"] == pytest.approx(2 * ((1 - 0.6) + (1 - 0.5)) / 3, rel=1e-4)

    def test_the_divisor_is_at_least_one(self):
        nothing = jnp.zeros((1, 2), bool)
        found, goal = predictions([[[HALF], [HALF]]], [[BOX, BOX]]), targets([[BOX]], [[0]], [[False]])
        terms = matched(FocalMatchedLoss(), found, nothing, jnp.zeros((1, 2), jnp.int32), goal)
        assert terms["class"] == pytest.approx(2 * 0.75 * 0.25 * np.log(2), rel=1e-5)
        assert terms["l1"] == terms["giou"] == 0

    def test_survivors_divide_and_removed_queries_are_no_background(self):
        """Two of three boxes are found, as only two queries count: the divisor is two."""
        found = predictions([[[HALF], [HALF], [HALF]]], [[BOX, BOX, BOX]], valid=[[True, True, False]])
        goal = targets([[BOX, BOX, BOX]], [[0, 0, 0]], [[True, True, True]])
        positive = jnp.array([[True, True, False]])
        terms = matched(FocalMatchedLoss(), found, positive, jnp.array([[2, 0, 0]]), goal)
        assert terms["class"] == pytest.approx(2 * 0.25 * 0.25 * np.log(2) / 2, rel=1e-5)


class TestAlignedMatchedLoss:
    # Two images. In the first, queries 0 and 1 stand for the one box, the second of them better; in the second nothing is
    # matched, but there are two boxes. So there are three boxes and two matches.
    LOGITS = np.array([[[FOUR_FIFTHS], [NINE_TENTHS], [FOUR_FIFTHS]], [[FOUR_FIFTHS], [HALF], [HALF]]])
    SHARES = np.array([[0.5, 0.8, 1.0], [1.0, 1.0, 1.0]])
    POSITIVE = np.array([[True, True, False], [False, False, False]])
    INDEX = np.zeros((2, 3), np.int32)
    GOAL = targets([[BOX, BOX]] * 2, [[0, 0]] * 2, [[True, False], [True, True]])

    def found(self, logits=LOGITS):
        return predictions(logits, [[narrowed(share) for share in shares] for shares in self.SHARES])

    def negatives(self):
        """Class loss of the queries without a box."""
        p = sigmoid(self.LOGITS[..., 0])[~self.POSITIVE]
        return np.sum(p**2 * -np.log(1 - p))

    def test_ranked_targets(self):
        terms = matched(AlignedMatchedLoss(), self.found(), self.POSITIVE, self.INDEX, self.GOAL)
        better, worse = 0.9**0.25 * 0.8**0.75, 0.8**0.25 * 0.5**0.75
        second = np.exp(-1 / 1.5)
        classes = cross_entropy(0.9, better) + cross_entropy(0.8, worse * second) + self.negatives()
        assert terms["class"] == pytest.approx(classes / 3, rel=1e-4)
        # The narrower box is 0.2 too narrow, the other one 0.08.
        assert terms["l1"] == pytest.approx(5 * (0.08 + 0.2 * second) / 3, rel=1e-4)
        assert terms["giou"] == pytest.approx(2 * (0.2 + 0.5 * second) / 3, rel=1e-4)

    def test_denoising_queries_are_not_ranked_and_divided_by_their_number(self):
        terms = matched(AlignedMatchedLoss(), self.found(), self.POSITIVE, self.INDEX, self.GOAL, denoising=True)
        classes = cross_entropy(0.9, 0.9**0.25 * 0.8**0.75) + cross_entropy(0.8, 0.8**0.25 * 0.5**0.75) + self.negatives()
        assert terms["class"] == pytest.approx(classes / 2, rel=1e-4)
        assert terms["l1"] == pytest.approx(5 * (0.08 + 0.2) / 2, rel=1e-4)
        assert terms["giou"] == pytest.approx(2 * (0.2 + 0.5) / 2, rel=1e-4)

    def test_the_blend_is_at_least_a_hundredth(self):
        """Boxes that do not touch have IoU 0; no other query, two boxes of which one is padded."""
        found = predictions([[[FOUR_FIFTHS]]], [[(0.1, 0.1, 0.1, 0.1)]])
        goal = targets([[BOX, BOX]], [[0, 0]], [[True, False]])
        terms = matched(AlignedMatchedLoss(), found, np.array([[True]]), np.zeros((1, 1), np.int32), goal)
        assert terms["class"] == pytest.approx(cross_entropy(0.8, 0.01), rel=1e-5)

    @pytest.mark.parametrize("denoising", [False, True])
    def test_the_divisor_is_at_least_one(self, denoising):
        """There are no boxes at all."""
        goal = self.GOAL.replace(valid=np.zeros((2, 2), bool))
        terms = matched(AlignedMatchedLoss(), self.found(), np.zeros((2, 3), bool), self.INDEX, goal, denoising=denoising)
        p = sigmoid(self.LOGITS)
        assert terms["class"] == pytest.approx(np.sum(p**2 * -np.log(1 - p)), rel=1e-4)
        assert terms["l1"] == terms["giou"] == 0

    def test_gradients(self):
        """The target is a constant, as are boxes to the class term; the weight p^2 of negatives is none."""
        p = sigmoid(self.LOGITS)
        goal = np.zeros_like(p)
        goal[0, :2, 0] = 0.8**0.25 * 0.5**0.75 * np.exp(-1 / 1.5), 0.9**0.25 * 0.8**0.75
        negative = 2 * p**2 * (1 - p) * -np.log(1 - p) + p**3
        expected = np.where(self.POSITIVE[..., None], p - goal, negative) / 3

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def gradients(logits, boxes):
            found = self.found().replace(logits=logits, boxes=boxes)
            return AlignedMatchedLoss()(found, self.POSITIVE, self.INDEX, self.GOAL, denoising=False)["class"]

        of_logits, of_boxes = gradients(self.found().logits, self.found().boxes)
        np.testing.assert_allclose(of_logits, expected, rtol=1e-4, atol=1e-6)
        assert not np.any(of_boxes)

    def test_ranks_are_within_a_box_and_ties_go_to_the_lower_index(self):
        """Queries 1, 3 and 4 stand for box 0, which 1 and 4 do not touch: both have the least blend. Query 2 stands for box
        1. Query 0 stands for none, and comes before nobody."""
        left, corner = (0.1, 0.5, 0.1, 0.4), (0.1, 0.1, 0.1, 0.1)
        found = predictions([[[HALF]] * 5], [[left, left, BOX, BOX, corner]])
        goal = targets([[BOX, BOX]], [[0, 0]], [[True, True]])
        index, positive = np.array([[0, 0, 1, 0, 0]], np.int32), np.arange(5)[None] > 0
        terms = matched(AlignedMatchedLoss(), found, positive, index, goal)
        ranked = (0.4 + 0.3) * np.exp(-1 / 1.5) + 2 * (0.4 + 0.3) * np.exp(-2 / 1.5)
        assert terms["l1"] == pytest.approx(5 * ranked / 2, rel=1e-4)


dense_loss = jax.jit(DenseLoss())


class TestDenseLoss:
    """Two images. In the first, three queries stand for two boxes; in the second, a box has one query that hardly meets it.
    The best-aligned query of the first box is not the one of the highest IoU."""

    LOGITS = np.array([[[NINE_TENTHS], [-NINE_TENTHS], [HALF], [FOUR_FIFTHS]], [[HALF], [HALF], [HALF], [HALF]]])
    SHARES = np.array([[0.8, 0.9, 1.0, 1.0], [0.05, 1.0, 1.0, 1.0]])
    ASSIGNED = np.array([[0, 0, 1, -1], [0, -1, -1, -1]])
    GOAL = targets([[BOX, BOX]] * 2, [[0, 0]] * 2, [[True, True], [True, False]])

    def found(self):
        return predictions(self.LOGITS, [[narrowed(share) for share in shares] for shares in self.SHARES])

    def quality(self):
        """Score times IoU to the sixth, scaled per box to its best IoU."""
        aligned = 0.9 * 0.8**6, 0.1 * 0.9**6
        faint = 0.5 * 0.05**6
        return np.array([[0.9, 0.9 * aligned[1] / aligned[0], 1.0, 0.0], [0.05 * faint / (faint + 1e-7), 0.0, 0.0, 0.0]])

    def test_values(self):
        """Divided by the sum of the batch's qualities, 2.1; the terms of each image are its own."""
        terms = dense_loss(self.found(), self.ASSIGNED, self.GOAL)
        quality, p = self.quality(), sigmoid(self.LOGITS[..., 0])
        classes = np.sum((p - quality) ** 2 * cross_entropy(p, quality), axis=1)
        np.testing.assert_allclose(terms["class"], classes / quality.sum(), rtol=1e-4)
        giou = np.sum(quality * (1 - self.SHARES), axis=1)
        np.testing.assert_allclose(terms["giou"], 2 * giou / quality.sum(), rtol=1e-3)

    def test_the_divisor_is_at_least_one(self):
        """The second image alone, twice: its one quality is 0.004."""
        twice = jax.tree.map(lambda x: np.repeat(x[1:], 2, axis=0), (self.found(), self.ASSIGNED, self.GOAL))
        quality, p = self.quality()[1], sigmoid(self.LOGITS[1, :, 0])
        classes = np.sum((p - quality) ** 2 * cross_entropy(p, quality))
        np.testing.assert_allclose(dense_loss(*twice)["class"], [classes, classes], rtol=1e-4)

    def test_what_does_not_count(self):
        """Neither an image without boxes nor a query that is none has a loss."""
        found = self.found().replace(valid=np.array([[True, True, True, False], [True] * 4]))
        goal = self.GOAL.replace(valid=np.array([[True, True], [False, False]]))
        assigned = np.where(np.array([[True], [False]]), self.ASSIGNED, -1)
        terms = dense_loss(found, assigned, goal)
        quality, p = self.quality()[0], sigmoid(self.LOGITS[0, :, 0])
        classes = np.sum((p - quality)[:3] ** 2 * cross_entropy(p, quality)[:3])
        np.testing.assert_allclose(terms["class"], [classes / quality.sum(), 0.0], rtol=1e-4)
        assert terms["giou"][1] == 0

    def test_qualities_are_constants(self):
        """Class terms do not move boxes, and box terms do not move scores."""
        found = self.found()

        @jax.jit
        @functools.partial(jax.jacrev, argnums=(0, 1))
        def jacobians(logits, boxes):
            terms = DenseLoss()(found.replace(logits=logits, boxes=boxes), self.ASSIGNED, self.GOAL)
            return {name: jnp.sum(term) for name, term in terms.items()}

        of_terms = jacobians(found.logits, found.boxes)
        assert np.any(of_terms["class"][0])
        assert not np.any(of_terms["class"][1])
        assert not np.any(of_terms["giou"][0])
        assert np.any(of_terms["giou"][1])


def test_quality_focal_loss_by_hand():
    """At probability 0.8 and the soft target 0.5, and as background."""
    loss = jax.jit(quality_focal_loss)(np.full(2, FOUR_FIFTHS), np.full(2, 0.5), np.array([True, False]))
    expected = [0.3**2 * -(0.5 * np.log(0.8) + 0.5 * np.log(0.2)), 0.8**2 * -np.log(0.2)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
