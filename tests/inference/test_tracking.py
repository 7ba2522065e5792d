"""Objects keep their numbers while they move, cross, change their class, score less, or are not seen for a while."""

import numpy as np

from hpr_jax.inference.detections import Detections
from hpr_jax.inference.tracking import Tracker, one_class_each

PERIOD = 0.04


def found(lefts, scores=None, labels=None):
    """Detections of squares of 20 pixels in rows of their own."""
    boxes = np.array([[left, 50 * row, left + 20, 50 * row + 20] for row, left in enumerate(lefts)], np.float32)
    scores = np.full(len(lefts), 0.9) if scores is None else np.array(scores)
    labels = np.zeros(len(lefts), int) if labels is None else np.array(labels)
    names, image = ["hat" for _ in lefts], np.zeros((100, 200, 3), np.uint8)
    return Detections(image, boxes.reshape(-1, 4), scores.astype(np.float32), labels, names, [9] * len(lefts))


def test_numbers_count_from_one_and_stay():
    tracker = Tracker(0.5)
    assert tracker(found([10, 80]), 0.0) == [None, None]
    for step in range(1, 10):
        assert tracker(found([10 + 3 * step, 80 - 3 * step]), step * PERIOD) == [1, 2]


def test_another_video_begins_anew():
    for _ in range(2):
        tracker = Tracker(0.5)
        tracker(found([10]), 0.0)
        assert tracker(found([12]), PERIOD) == [1]


def test_low_scores_continue_tracks_and_begin_none():
    tracker = Tracker(0.5)
    for step in range(3):
        tracker(found([10, 80], [0.9, 0.2]), step * PERIOD)
    assert tracker(found([10, 80], [0.2, 0.2]), 3 * PERIOD) == [1, None]


def test_another_class_is_the_same_object():
    tracker = Tracker(0.5)
    assert [tracker(found([10], labels=[step % 2]), step * PERIOD) for step in range(4)] == [[None], [1], [1], [1]]


def test_time_counts_and_not_frames():
    """At 4 pixels a frame, an object that is not seen for 8 frames is 36 pixels further, which its motion foretells. After
    more than a second it is forgotten, although there were few frames."""
    tracker = Tracker(0.5)
    for step in range(6):
        numbers = tracker(found([4 * step]), step * PERIOD)
    assert numbers == [1]
    assert tracker(found([4 * 14]), 14 * PERIOD) == [1]
    assert tracker(found([4 * 15]), 14 * PERIOD + 1.2) == [None]
    assert tracker(found([4 * 16]), 15 * PERIOD + 1.2) == [2]


def test_no_objects():
    tracker = Tracker(0.5)
    assert tracker(found([]), 0.0) == []
    assert tracker(found([5]), PERIOD) == [None]
    assert tracker(found([]), 2 * PERIOD) == []


def test_an_object_of_several_classes_is_one():
    detections = found([10, 10, 80], scores=[0.75, 0.5, 0.25], labels=[1, 0, 1])
    detections.boxes[1] = detections.boxes[0]
    once = one_class_each(detections)
    assert (once.scores.tolist(), once.labels.tolist()) == ([0.75, 0.25], [1, 1])
    assert len(one_class_each(found([]))) == 0
