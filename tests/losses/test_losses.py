"""Matching against brute force, values of losses by hand, and what losses must and must not depend on."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from loss_terms import loss_terms

from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.functions import quality_focal_loss, sigmoid_focal_loss
from hpr_jax.losses.matching import Request, focal_cost, solve_on_device, solve_on_host
from hpr_jax.types import BranchPredictions, Intermediates, Outputs, Predictions

RNG = np.random.default_rng(0)


def solve_by_kernel(costs, query_valid, target_valid, repeats):
    """The kernel in place of SciPy."""
    requests = [
        Request(jnp.asarray(cost), jnp.asarray(valid), tuple(wanted))
        for cost, valid, wanted in zip(costs, query_valid, repeats)
    ]
    return jax.device_get(solve_on_device(requests, jnp.asarray(target_valid), interpret=True))


solvers = pytest.mark.parametrize("solve", [solve_on_host, solve_by_kernel])
UNUSED = [field.name for field in dataclasses.fields(Intermediates) if field.name != "spatial_shapes"]


@solvers
def test_assignment_is_the_cheapest(solve):
    cost = RNG.normal(size=(2, 3, 3, 5)).astype(np.float32)
    valid = np.array([[True] * 3, [True, True, False], [False] * 3])
    (assigned,) = solve([cost], [np.ones((2, 3, 5), bool)], valid, [(1, 1)])
    for problem, image in np.ndindex(2, 3):
        count = int(valid[image].sum())
        best = min(
            sum(cost[problem, image, n, q] for n, q in enumerate(queries))
            for queries in itertools.permutations(range(5), count)
        )
        rows = np.flatnonzero(assigned[problem, image] >= 0)
        assert sorted(assigned[problem, image, rows].tolist()) == list(range(count))
        assert sum(cost[problem, image, assigned[problem, image, q], q] for q in rows) == pytest.approx(best, abs=1e-5)


@solvers
def test_invalid_queries_stay_unmatched(solve):
    cost = np.zeros((1, 1, 2, 4), np.float32)
    query_valid = np.array([[[False, True, False, False]]])
    (assigned,) = solve([cost], [query_valid], np.ones((1, 2), bool), [(1,)])
    assert (assigned[0, 0] >= 0).tolist() == [False, True, False, False]


@solvers
@pytest.mark.parametrize(("repeats", "expected"), [(1, 1), (3, 3), (9, 3)])
def test_a_box_takes_as_many_queries_as_suffice(solve, repeats, expected):
    cost = RNG.normal(size=(1, 1, 2, 7)).astype(np.float32)
    (assigned,) = solve([cost], [np.ones((1, 1, 7), bool)], np.ones((1, 2), bool), [(repeats,)])
    assert np.bincount(assigned[0, 0][assigned[0, 0] >= 0]).tolist() == [expected, expected]


@solvers
@pytest.mark.parametrize(
    "cost",
    [
        [[np.nan, np.inf], [0.0, -np.inf], [1.0, 2.0]],
        # Too few queries have a finite cost: the solver raises other errors for each of these.
        [[np.nan, np.nan], [np.nan, np.nan], [1.0, 2.0]],
        [[np.inf, np.inf], [np.inf, np.inf], [1.0, 2.0]],
        [[-np.inf, -np.inf], [-np.inf, -np.inf], [1.0, 2.0]],
    ],
)
def test_not_finite_costs_do_not_raise(solve, cost):
    (assigned,) = solve(
        [np.array([[cost]], np.float32).swapaxes(2, 3)], [np.ones((1, 1, 3), bool)], np.ones((1, 2), bool), [(1,)]
    )
    assert assigned.max() == 1


KINDS_OF_COSTS = {
    "independent": lambda *shape: RNG.normal(size=shape),
    "a popular query": lambda *shape: RNG.normal(size=shape) - 50 * (RNG.random(shape[-1]) < 0.2),
    "one row for all boxes": lambda *shape: (
        np.broadcast_to(RNG.normal(size=shape[-1]), shape) + 1e-3 * RNG.normal(size=shape)
    ),
    # Many assignments are equally good.
    "equal ones": lambda *shape: RNG.integers(0, 3, shape),
}


@pytest.mark.parametrize("kind", KINDS_OF_COSTS)
@pytest.mark.parametrize(("boxes", "queries"), [(5, 9), (9, 40), (12, 10)])
def test_the_kernel_finds_what_scipy_finds(kind, boxes, queries):
    """Some queries do not count, some boxes are none, and boxes want 1 to 4 queries."""
    for _ in range(4):
        cost = KINDS_OF_COSTS[kind](2, 3, boxes, queries).astype(np.float32)
        valid, real = RNG.random((2, 3, queries)) < 0.8, np.arange(boxes) < RNG.integers(0, boxes + 1, (3, 1))
        arguments = [cost], [valid], real, [tuple(map(int, RNG.integers(1, 5, 2)))]
        (expected,), (assigned,) = solve_on_host(*arguments), solve_by_kernel(*arguments)
        if kind != "equal ones":
            np.testing.assert_array_equal(assigned, expected)
            continue
        assert not np.any(assigned[~valid] >= 0)
        for problem, image in np.ndindex(2, 3):
            found, best = assigned[problem, image], expected[problem, image]
            assert np.sort(found).tolist() == np.sort(best).tolist() or boxes > queries
            assert total(cost[problem, image], found) == total(cost[problem, image], best)


def total(cost, assigned):
    queries = np.flatnonzero(assigned >= 0)
    return cost[assigned[queries], queries].sum()


def test_focal_terms_by_hand():
    logits = jnp.array([0.0, 0.0])
    loss = sigmoid_focal_loss(logits, jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(loss, [0.25 * 0.25 * np.log(2), 0.75 * 0.25 * np.log(2)], rtol=1e-6)
    cost = focal_cost(jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32))
    assert cost[0, 0] == pytest.approx((0.25 - 0.75) * 0.25 * np.log(2), rel=1e-5)
    # A quality target that is met costs nothing but the entropy, weighted by zero.
    assert quality_focal_loss(jnp.array(0.0), jnp.array(0.5), jnp.array(True)) == pytest.approx(0.0, abs=1e-7)


def predictions(key, layers, batch, queries):
    drawn = jax.random.normal(key, (layers, batch, queries, tiny.CLASSES + 4))
    logits, boxes = drawn[..., : tiny.CLASSES], jax.nn.sigmoid(drawn[..., tiny.CLASSES :])
    return Predictions(logits, boxes, jnp.ones(logits.shape[:-1], bool))


def outputs(layers=2, batch=2):
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def branch():
        return BranchPredictions(
            matching=predictions(next(keys), layers, batch, 6),
            denoising=None,
            dense=predictions(next(keys), layers, batch, 9),
        )

    first = jax.tree.map(lambda x: x[0], predictions(next(keys), 1, batch, 6))
    dense = jax.tree.map(lambda x: x[0], predictions(next(keys), 1, batch, 9))
    empty = jnp.zeros(0)
    return Outputs(
        primary=branch(),
        branches={"other": branch()},
        proposals=first,
        dense_proposals=dense,
        intermediates=Intermediates(**dict.fromkeys(UNUSED, empty), spatial_shapes=()),
    )


@jax.jit
def terms_of(outputs, targets):
    return loss_terms(Criterion(branch_weights=(("other", 0.5),)), outputs, targets)


def test_terms_of_every_branch_and_layer():
    terms = terms_of(outputs(), tiny.targets([2, 1], 3, [[50, 60], [60, 40]]))
    kinds = {f"{b}{k}" for b in ("", "other/") for k in ("layer_0", "layer_1", "dense_0", "dense_1")}
    kinds |= {"proposals", "dense_proposals"}
    assert {name.rpartition("/")[0] for name in terms} == kinds
    assert all(np.all(np.isfinite(term)) and np.all(term >= 0) for term in terms.values())


def test_padded_boxes_change_nothing():
    """With more room for ground truth, filled with other boxes that are not valid, the terms are the same."""
    small = tiny.targets([2, 1], 2, [[50, 60], [60, 40]])
    large = tiny.targets([2, 1], 5, [[50, 60], [60, 40]], seed=1)
    large = large.replace(boxes=large.boxes.at[:, :2].set(small.boxes), labels=large.labels.at[:, :2].set(small.labels))
    a, b = terms_of(outputs(), small), terms_of(outputs(), large)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)


def test_an_image_without_boxes():
    terms = terms_of(outputs(), tiny.targets([2, 0], 3, [[50, 60], [60, 40]]))
    for name, term in terms.items():
        if "dense" in name:
            assert term[1] == 0, name
    nothing = terms_of(outputs(), tiny.targets([0, 0], 3, [[50, 60], [60, 40]]))
    assert nothing["layer_1/class"] > 0
    assert nothing["layer_1/l1"] == nothing["layer_1/giou"] == 0


def test_queries_that_do_not_count_change_nothing():
    targets = tiny.targets([2, 1], 3, [[50, 60], [60, 40]])
    out = outputs()
    valid = out.primary.matching.valid.at[1, :, 3].set(False)

    def with_logits(value):
        matching = out.primary.matching.replace(valid=valid, logits=out.primary.matching.logits.at[1, :, 3].set(value))
        return out.replace(primary=out.primary.replace(matching=matching))

    a, b = terms_of(with_logits(0.0), targets), terms_of(with_logits(9.0), targets)
    assert all(np.array_equal(a[name], b[name]) for name in a)
