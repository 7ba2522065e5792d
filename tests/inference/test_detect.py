"""The best (query, class) pairs of the last layer, with hand-made values."""

import jax.numpy as jnp
import numpy as np

from hpr_jax.inference.detect import top_detections
from hpr_jax.types import Predictions


def logit(*probabilities):
    p = np.array(probabilities)
    return np.log(p / (1 - p))


# Two images, two queries, three classes; the second query of the second image does not exist.
PREDICTIONS = Predictions(
    logits=jnp.asarray([[logit(0.1, 0.9, 0.5), logit(0.6, 0.2, 0.8)], [logit(0.1, 0.2, 0.3), logit(0.9, 0.9, 0.9)]]),
    boxes=jnp.asarray([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.5, 0.4, 1.0]], [[0.25, 0.5, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]]),
    valid=jnp.asarray([[True, True], [True, False]]),
)
# (height, width)
SIZES = jnp.asarray([[100, 200], [40, 80]])


def test_pairs_by_score_with_boxes_in_pixels():
    boxes, scores, labels, valid = top_detections(PREDICTIONS, SIZES, 4)
    np.testing.assert_allclose(scores[0], [0.9, 0.8, 0.6, 0.5], rtol=1e-5)
    assert labels[0].tolist() == [1, 2, 0, 2]
    # The second query reaches beyond the right edge.
    first, second = [80, 30, 120, 70], [140, 0, 200, 100]
    np.testing.assert_allclose(boxes[0], [first, second, second, first], atol=1e-4)
    assert valid[0].all()


def test_queries_that_do_not_exist_come_last_and_are_not_valid():
    boxes, scores, labels, valid = top_detections(PREDICTIONS, SIZES, 4)
    np.testing.assert_allclose(scores[1], [0.3, 0.2, 0.1, 0], atol=1e-6)
    assert labels[1, :3].tolist() == [2, 1, 0]
    assert valid[1].tolist() == [True, True, True, False]
    np.testing.assert_allclose(boxes[1, :3], [[0, 10, 40, 30]] * 3, atol=1e-4)


def test_no_more_than_there_are():
    assert [x.shape[1] for x in top_detections(PREDICTIONS, SIZES, 100)] == [6] * 4
