"""What detections get wrong, worked out by hand for a few boxes."""

import numpy as np
import pictures
import pytest

from hpr_jax.analysis.diagnosis import Doubt, ImageErrors, diagnose
from hpr_jax.data.dataset import Classes
from hpr_jax.evaluation.average_precision import LIMITS, coco_average_precision

CUP, PEN, HAT = 2, 5, 9
# The boxes of the objects: a cup and a pen in the image 10, a cup in 11, and nothing in 12.
FIRST, SECOND = [10, 10, 40, 40], [60, 60, 90, 90]


def split(classes=pictures.CLASSES, labels=((0, 1), (0,), ())):
    image = pictures.plain(100, 100, pictures.GREEN)
    return pictures.dataset([image] * 3, [[FIRST, SECOND], [FIRST], []], labels, classes=classes)


def found(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


# One detection is right. The others are a pen taken for a cup, a cup that overlaps its object by a third, a second detection
# of the first cup, and a hat where nothing is.
RIGHT = found(10, CUP, [10, 10, 30, 30], 0.9)
WRONG_CLASS = found(10, CUP, [60, 60, 30, 30], 0.8)
TOO_FAR = found(11, CUP, [25, 10, 30, 30], 0.7)
SECOND_TIME = found(10, CUP, [11, 10, 30, 30], 0.6)
NOTHING_THERE = found(12, HAT, [70, 10, 20, 20], 0.95)
DETECTIONS = [RIGHT, WRONG_CLASS, TOO_FAR, SECOND_TIME, NOTHING_THERE]


@pytest.fixture(scope="module")
def diagnosis():
    return diagnose(split(), DETECTIONS, LIMITS)


def test_precision_is_that_of_pycocotools(diagnosis):
    metrics, by_category = coco_average_precision(split(), DETECTIONS, "pycocotools")
    assert diagnosis.metrics == pytest.approx(metrics)
    for one, category in zip(diagnosis.classes, (CUP, PEN, HAT)):
        assert one.precision == pytest.approx(by_category[category]["AP"])
        assert one.precision50 == pytest.approx(by_category[category]["AP50"])
    # Of the recalls 0, 0.01, ..., 1, the 51 up to one half are reached, with a precision of 1.
    assert diagnosis.classes[0].precision50 == pytest.approx(51 / 101)
    assert [one.objects for one in diagnosis.classes] == [2, 1, 0]
    assert diagnosis.classes[2].precision == -1


def test_each_error_is_of_its_kind(diagnosis):
    assert diagnosis.errors["counts"] == {"Cls": 1, "Loc": 1, "Both": 0, "Dupe": 1, "Bkg": 1, "Miss": 0}
    # The mean over cup and pen.
    assert diagnosis.errors["ap_base"] == pytest.approx(51 / 101 / 2)
    # The pen would be right, and of the cups nothing would change.
    assert diagnosis.errors["delta_ap"]["Cls"] == pytest.approx(0.5, abs=0.02)
    assert diagnosis.errors["delta_ap"]["Dupe"] == pytest.approx(0.0, abs=1e-9)


def test_an_object_that_nothing_is_near_is_missed():
    errors = diagnose(split(), [RIGHT], LIMITS).errors
    assert errors["counts"]["Miss"] == 2


def test_the_threshold_is_that_of_the_best_f1(diagnosis):
    """At a recall of one half, where the cups have no error yet, the pens have none at any score."""
    assert diagnosis.threshold == pytest.approx(0.9)
    assert diagnosis.counting == [RIGHT, NOTHING_THERE]


def test_what_was_taken_for_what(diagnosis):
    # Rows are cup, pen, hat and background, and columns what they were taken for.
    expected = [[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert np.asarray(diagnosis.confusion["matrix"]).tolist() == expected
    assert diagnosis.confusion["cat_names"] == ["cup", "pen", "hat"]


def test_classes_stand_in_the_order_of_their_labels():
    """Evaluators put categories in the order of their ids."""
    classes = Classes(("hat", "cup", "pen"), (HAT, CUP, PEN))
    diagnosis = diagnose(split(classes, ((1, 2), (1,), ())), DETECTIONS, LIMITS)
    assert [(one.name, one.objects) for one in diagnosis.classes] == [("hat", 0), ("cup", 2), ("pen", 1)]
    expected = [[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]]
    assert np.asarray(diagnosis.confusion["matrix"]).tolist() == expected
    assert diagnosis.confusion["cat_names"] == ["hat", "cup", "pen"]


def test_errors_are_those_of_their_images(diagnosis):
    """Of the ground truth, 0 and 1 are the cup and the pen of the first image, and 2 the cup of the second."""
    assert diagnosis.images == [
        ImageErrors(1, right=[], false=[], missed=[2]),
        ImageErrors(2, right=[], false=[1], missed=[]),
        ImageErrors(0, right=[0], false=[], missed=[1]),
    ]


def test_the_worst_image_is_the_first():
    detections = [RIGHT, found(11, CUP, [10, 10, 30, 30], 0.9), found(12, CUP, [0, 0, 9, 9], 0.9)]
    detections += [found(12, CUP, [50, 50, 9, 9], 0.9), found(10, PEN, [60, 60, 30, 30], 0.9)]
    diagnosis = diagnose(split(), detections, LIMITS)
    assert diagnosis.images == [ImageErrors(2, right=[], false=[2, 3], missed=[])]


def test_annotations_are_doubted(diagnosis):
    assert diagnosis.doubts == [Doubt("missing_annotation", place=2, detection=1, annotation=None)]
    pen = found(11, PEN, [10, 10, 30, 30], 0.85)
    (doubt,) = diagnose(split(), [RIGHT, pen, found(10, PEN, [60, 60, 30, 30], 0.7)], LIMITS).doubts
    assert doubt == Doubt("wrong_label", place=1, detection=1, annotation=2)


def test_no_detections():
    diagnosis = diagnose(split(), [], LIMITS)
    assert diagnosis.metrics == coco_average_precision(split(), [], "pycocotools")[0]
    assert (diagnosis.threshold, diagnosis.counting, diagnosis.errors, diagnosis.calibration) == (None, [], None, None)
    assert [(image.place, image.false, image.missed) for image in diagnosis.images] == [(0, [], [0, 1]), (1, [], [2])]
    assert np.asarray(diagnosis.confusion["matrix"]).tolist() == [[0, 0, 0, 2], [0, 0, 0, 1], [0] * 4, [0] * 4]
    assert not diagnosis.doubts


def test_no_right_detection():
    diagnosis = diagnose(split(), [NOTHING_THERE], LIMITS)
    assert (diagnosis.threshold, diagnosis.counting) == (None, [])
    assert diagnosis.errors["counts"]["Bkg"] == 1


def test_scores_are_compared_with_shares_of_right_detections(diagnosis):
    """Detections of classes without objects are right or wrong, too."""
    by_bin = {round(one["bin_lower"], 1): one for one in diagnosis.calibration["bins"] if one["count"]}
    assert sum(one["count"] for one in by_bin.values()) == 5
    assert by_bin[0.9]["avg_accuracy"] == pytest.approx(0.5)
    assert by_bin[0.9]["avg_confidence"] == pytest.approx((0.9 + 0.95) / 2)


def test_text_ids_are_fine():
    data = split(Classes(("cup", "pen", "hat"), ("c", "p", "h")))
    detections = [{**one, "category_id": {CUP: "c", PEN: "p", HAT: "h"}[one["category_id"]]} for one in DETECTIONS]
    assert diagnose(data, detections, LIMITS).errors["counts"]["Cls"] == 1
