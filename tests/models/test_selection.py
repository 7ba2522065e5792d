"""DDQ's selection of distinct queries between layers."""

import jax.numpy as jnp
import numpy as np

from hpr_jax.models.refiner.nms_selection import distinct_attention, select_distinct, valid_queries


def test_selected_queries_see_all_and_are_seen():
    selected = jnp.array([[False, True, False, True]])
    mask = np.asarray(distinct_attention(selected))[0]
    assert mask[1].all()
    assert mask[:, 3].all()
    assert mask[0].tolist() == [False, True, False, True]


def test_all_are_valid_if_the_first_is_selected():
    assert valid_queries(jnp.array([True, False, True])).tolist() == [True, True, True]
    assert valid_queries(jnp.array([False, False, True])).tolist() == [False, False, True]


def test_duplicate_queries_break_ties_by_index():
    boxes = jnp.full((4, 4), 0.5)
    # By rounding, the last of three identical queries has the highest score.
    scores = jnp.array([0.1, 0.5, 0.5, 0.5000001])
    duplicates = jnp.array([False, True, True, True])
    selected = select_distinct(scores, boxes, jnp.ones(4, bool), duplicates, 0.8)
    assert selected.tolist() == [False, True, False, False]


def test_duplicates_that_were_selected_differently_are_no_longer_alike():
    """Query 2 keeps its own score and box, not those of query 1, which would suppress query 3."""
    here, there = [0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]
    boxes, scores = jnp.array([there, here, there, here]), jnp.array([0.1, 0.9, 0.5, 0.7])
    selected, duplicates = jnp.array([False, False, True, True]), jnp.array([False, True, True, False])
    assert select_distinct(scores, boxes, selected, duplicates, 0.8).tolist() == [False, False, True, True]
