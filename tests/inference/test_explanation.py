"""Where queries sample the image, against what the detector itself samples."""

import io

import numpy as np
import pytest
import tiny
from PIL import Image

from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.models.build import random_detector

CLASSES = Classes(("cup", "pen", "hat"), (2, 5, 9))
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 80, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def detector():
    config = tiny.config()
    return ImageDetector(random_detector(config.model, 3), CLASSES, config)


@pytest.fixture(scope="module")
def explanation(detector):
    return detector.explain(IMAGE)


def test_the_best_query_is_that_of_the_best_detection(detector, explanation):
    best = detector(IMAGE, 0.0)
    scores = explanation.scores["primary"][-1]
    assert scores.max() == pytest.approx(best.scores[0], rel=1e-5)
    assert CLASSES.names[int(scores.argmax())] == best.names[0]
    np.testing.assert_allclose(np.clip(explanation.boxes["primary"][-1], 0, [80, 48] * 2), best.boxes[0], atol=0.01)


def test_samples_of_untrained_attention_surround_the_box(detector, explanation):
    """At first, weights are equal, and offsets point in all directions, in steps of a part of the box."""
    settings = detector.config.model
    layers, count = settings.refiner.layers, settings.heads * settings.levels * settings.points
    assert explanation.points.shape == (layers, count, 2)
    np.testing.assert_allclose(explanation.weights.sum(axis=-1), settings.heads, rtol=1e-5)
    for points, (x1, y1, x2, y2) in zip(explanation.points, explanation.reference_boxes):
        center, half = np.array([x1 + x2, y1 + y2]) / 2, np.array([x2 - x1, y2 - y1]) / 2
        distance = np.abs(points - center) / half
        assert distance.max() == pytest.approx(1.0, abs=0.1)
        np.testing.assert_allclose(points.mean(axis=0), center, atol=0.2 * half.max())


def test_every_branch_is_there(detector, explanation):
    assert list(explanation.boxes) == ["primary", *detector.module.refiner.branches]
    assert all(boxes.shape == explanation.boxes["primary"].shape for boxes in explanation.boxes.values())


def test_pictures(explanation):
    picture = explanation.draw()
    assert picture.dtype == np.uint8
    assert picture.shape[0] > 300
    assert Image.open(io.BytesIO(explanation._repr_png_())).size == picture.shape[1::-1]
    assert "layers>" in repr(explanation)


def test_another_query(detector, explanation):
    other = (explanation.query + 1) % detector.config.model.queries.count
    assert detector.explain(IMAGE, other).query == other
    with pytest.raises(UserError, match=r"There is no query 9999; this detector has the queries 0 to"):
        detector.explain(IMAGE, 9999)


def test_a_primary_refiner_that_does_not_sample():
    config = tiny.config()
    config.model.refiner.update(primary="point", auxiliaries=())
    made = ImageDetector(random_detector(config.model, 3), CLASSES, config)
    with pytest.raises(UserError, match="Only queries of the primary refiner 'deformable' sample"):
        made.explain(IMAGE)
