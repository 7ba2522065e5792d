"""The best queries of each branch, worked out by hand."""

import numpy as np
import pytest
from stubs import stub

from hpr_jax.inference.branches import top_queries
from hpr_jax.types import Predictions

# Two layers, one image, three queries, two classes.
LOGITS = np.array([[[[0, 1], [2, -1], [9, 9]]], [[[4, 0], [-1, 3], [9, 9]]]], np.float32)
BOXES = np.tile(np.array([[0.5, 0.5, 0.2, 0.4], [0.1, 0.5, 0.4, 0.5], [0, 0, 1, 1]], np.float32), (2, 1, 1, 1))
# Not in the order of the alphabet, which compiled programs put them into.
NAMES = ("regional_attention", "dynamic_conv")
VALID = np.tile(np.array([True, True, False]), (2, 1, 1))


def outputs(logits=LOGITS):
    def branch(sign):
        return stub(matching=Predictions(logits=sign * logits, boxes=BOXES, valid=VALID))

    return stub(primary=branch(1), branches={"dynamic_conv": branch(-1), "regional_attention": branch(1)})


def test_the_best_class_of_the_best_queries():
    found = top_queries(outputs(), NAMES, 2, np.array([100, 50]), np.array([100, 50]), ["cup", "pen"])
    assert list(found) == ["primary", "regional_attention", "dynamic_conv"]
    first, last = found["primary"]
    assert first.queries.tolist() == [1, 0]
    assert first.names == ["cup", "pen"]
    np.testing.assert_allclose(first.scores, 1 / (1 + np.exp([-2.0, -1.0])), rtol=1e-6)
    # The left side of the first box is at -10, outside of the image.
    np.testing.assert_allclose(first.boxes, [[0, 12.5, 30, 37.5], [40, 15, 60, 35]], atol=1e-4)
    assert (last.queries.tolist(), last.labels.tolist()) == ([0, 1], [0, 1])
    assert [one.queries.tolist() for one in found["dynamic_conv"]] == [[1, 0], [1, 0]]


def test_queries_that_do_not_exist_are_never_there():
    found = top_queries(outputs(), NAMES, 10, np.array([1, 1]), np.array([1, 1]), ["cup", "pen"])
    assert len(found["primary"][0].queries) == 2


def test_as_json():
    (one, _), *_ = top_queries(outputs(), NAMES, 1, np.array([10, 10]), np.array([10, 10]), ["cup", "pen"]).values()
    score = pytest.approx(1 / (1 + np.exp(-2)))
    assert one.to_dict() == [{"query": 1, "box": pytest.approx([0, 2.5, 3, 7.5]), "score": score, "label": 0, "name": "cup"}]
