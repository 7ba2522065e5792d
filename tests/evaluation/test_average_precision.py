"""Average precision: both evaluators give the same numbers, also for unusual annotations and detections."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hpr_jax.data.dataset import Classes, Dataset
from hpr_jax.data.images import ImageFolder
from hpr_jax.data.sources.coco import group_annotations
from hpr_jax.data.sources.coco_entries import parse_entries
from hpr_jax.evaluation.average_precision import LIMITS, coco_average_precision, metric_names

# Sides of squares, in pixels, that COCO counts as small, medium and large objects.
SIDES = {"small": 20, "medium": 60, "large": 120}


@pytest.fixture
def annotations():
    """Annotations of eight images in COCO's format, and their objects."""
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 300, "width": 300} for i in range(8)]
    objects: list[dict] = []
    for image in images:
        for _ in range(5):
            x, y, w, h = rng.uniform(5, 150, 4).tolist()
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice([3, 8])),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(len(objects) % 9 == 0),
                }
            )
    categories = [{"id": c, "name": str(c)} for c in (3, 8, 11)]
    return {"images": images, "annotations": objects, "categories": categories}, objects


def average_precision(content, detections, evaluator="auto", classes=None, limits=LIMITS):
    """Average precision on the annotations of a file."""
    entries = group_annotations(content, Path("file"))
    images = ImageFolder(Path(), [image["file_name"] for image, _ in entries])
    dataset = Dataset("file", "", *parse_entries(entries, content["categories"], "file", images, classes, masks=False))
    return coco_average_precision(dataset, detections, evaluator, limits)


def noisy(objects):
    """Three detections for each object, with other boxes and random scores."""
    rng = np.random.default_rng(1)
    return [
        {
            "image_id": o["image_id"],
            "category_id": o["category_id"],
            "bbox": (np.array(o["bbox"]) * rng.uniform(0.8, 1.2, 4)).tolist(),
            "score": float(rng.random()),
        }
        for o in objects * 3
    ]


def test_fast_evaluator_gives_the_same_numbers(annotations):
    truth, objects = annotations
    found = noisy(objects)
    slow, slow_classes = average_precision(truth, found, "pycocotools")
    fast, fast_classes = average_precision(truth, found, "hotcoco")
    assert list(slow) == list(metric_names())
    assert 0.1 < slow["AP"] < 0.9
    for name in metric_names():
        assert fast[name] == pytest.approx(slow[name], abs=1e-9), name
    for category in (3, 8, 11):
        assert fast_classes[category] == pytest.approx(slow_classes[category], abs=1e-9)
    assert slow_classes[11] == {"AP": -1.0, "AP50": -1.0}


@pytest.mark.parametrize("evaluator", ["pycocotools", "hotcoco"])
@pytest.mark.parametrize("limits", [(1, 10, 100), (100, 300, 1000)])
def test_numbers_are_those_of_pycocotools(annotations, tmp_path, evaluator, limits):
    """With its own summary, which mmdetection takes, too."""
    truth, objects = annotations
    found = noisy(objects)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    loaded = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(loaded, loaded.loadRes(found), "bbox")
    evaluation.params.maxDets = list(limits)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics, _ = average_precision(truth, found, evaluator, limits=limits)
    assert list(metrics) == metric_names(limits)
    assert list(metrics.values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-12)


def test_perfect_detections(annotations):
    truth, objects = annotations
    found = [{**o, "score": 0.9} for o in objects if not o["iscrowd"]]
    metrics, per_class = average_precision(truth, found, "pycocotools")
    assert metrics["AP"] == pytest.approx(1.0)
    assert per_class[3]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("evaluator", ["pycocotools", "hotcoco"])
def test_the_order_of_a_models_classes_does_not_matter(annotations, evaluator):
    truth, objects = annotations
    found = noisy(objects)
    classes = Classes(("8", "11", "3"), (8, 11, 3))
    expected, of_each = average_precision(truth, found, evaluator)
    metrics, per_class = average_precision(truth, found, evaluator, classes)
    assert metrics == expected
    assert per_class == of_each
    assert 0 < of_each[3]["AP"] != of_each[8]["AP"]


def test_no_detections(annotations):
    truth, _ = annotations
    metrics, per_class = average_precision(truth, [])
    # Numbers of areas without objects are not defined.
    areas = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    real = [o["area"] for o in annotations[1] if not o["iscrowd"]]
    for name, (low, high) in areas.items():
        expected = 0.0 if any(low <= area <= high for area in real) else -1.0
        assert metrics[f"AP_{name}"] == metrics[f"AR_{name}"] == expected
    assert metrics["AP"] == metrics["AR100"] == 0.0
    assert per_class[3]["AP"] == 0.0
    assert per_class[11]["AP"] == -1.0


@pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
def test_files_that_lack_what_evaluators_want(annotations, evaluator):
    truth, objects = annotations
    found = noisy(objects)
    expected, _ = average_precision(truth, found, evaluator)
    content = copy.deepcopy(truth)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["id"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    broken = {"image_id": 0, "category_id": 3}
    content["annotations"] += [{**broken, "bbox": [1, 2, 3]}, {**broken, "bbox": [1, 2, float("inf"), 3]}]
    assert average_precision(content, found, evaluator)[0] == expected


@pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
@pytest.mark.parametrize("number", [lambda place: place, lambda place: 1])
def test_ids_of_objects_do_not_count(annotations, evaluator, number):
    """An id of 0 and ids that occur twice change nothing."""
    truth, objects = annotations
    found = noisy(objects)
    expected, _ = average_precision(truth, found, evaluator)
    content = copy.deepcopy(truth)
    for place, annotation in enumerate(content["annotations"]):
        annotation["id"] = number(place)
    assert average_precision(content, found, evaluator)[0] == expected


class TestHandMadeValues:
    """Each number is what its name says, and each class has its own."""

    def truth(self, boxes, categories=None):
        categories = [3] * len(boxes) if categories is None else categories
        annotations = [
            {"image_id": 1, "category_id": category, "bbox": list(box)} for box, category in zip(boxes, categories)
        ]
        image = {"id": 1, "file_name": "1.jpg", "height": 2000, "width": 2000}
        return {"images": [image], "annotations": annotations, "categories": [{"id": c, "name": str(c)} for c in (3, 8)]}

    def found(self, boxes, categories=None):
        categories = [3] * len(boxes) if categories is None else categories
        return [
            {"image_id": 1, "category_id": category, "bbox": list(box), "score": 0.9 - number / 1000}
            for number, (box, category) in enumerate(zip(boxes, categories))
        ]

    @pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
    def test_overlaps(self, evaluator):
        """An IoU of 0.62 counts at the thresholds 0.5, 0.55 and 0.6 of ten; one of 0.77 at six."""
        for width, expected in ((62, {"AP": 0.3, "AP50": 1, "AP75": 0}), (77, {"AP": 0.6, "AP50": 1, "AP75": 1})):
            metrics, per_class = average_precision(
                self.truth([(0, 0, 100, 100)]), self.found([(0, 0, width, 100)]), evaluator
            )
            assert {name: metrics[name] for name in expected} == pytest.approx(expected)
            assert per_class == {3: pytest.approx({"AP": expected["AP"], "AP50": 1}), 8: {"AP": -1, "AP50": -1}}

    @pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
    @pytest.mark.parametrize("size", SIDES)
    def test_sizes(self, evaluator, size):
        """Of a small, a medium and a large object, one is found."""
        boxes = {name: (300 * place, 0, side, side) for place, (name, side) in enumerate(SIDES.items())}
        metrics, _ = average_precision(self.truth(boxes.values()), self.found([boxes[size]]), evaluator)
        for name in SIDES:
            found = metrics[f"AP_{name}"], metrics[f"AR_{name}"]
            assert found == pytest.approx((float(name == size),) * 2)

    @pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
    def test_numbers_of_detections(self, evaluator):
        """All of twenty objects are found. The first detection alone finds one of them, the first ten find half."""
        boxes = [(90 * (number % 10), 90 * (number // 10), 80, 80) for number in range(20)]
        metrics, _ = average_precision(self.truth(boxes), self.found(boxes), evaluator)
        assert (metrics["AR1"], metrics["AR10"], metrics["AR100"]) == pytest.approx((0.05, 0.5, 1.0))

    @pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
    def test_other_numbers_of_detections(self, evaluator):
        """Of 150 objects, 100 detections find two thirds, and 300 all."""
        boxes = [(30 * (number % 15), 30 * (number // 15), 20, 20) for number in range(150)]
        limits = (100, 300, 1000)
        metrics, per_class = average_precision(self.truth(boxes), self.found(boxes), evaluator, limits=limits)
        assert list(metrics)[6:9] == ["AR100", "AR300", "AR1000"]
        assert (metrics["AR100"], metrics["AR300"], metrics["AR1000"]) == pytest.approx((2 / 3, 1, 1))
        # Precision is 1 at the 67 of 101 recalls up to two thirds.
        assert (metrics["AP"], metrics["AP50"], metrics["AP75"]) == pytest.approx((67 / 101, 1, 1))
        assert per_class[3]["AP"] == pytest.approx(67 / 101)

    @pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
    @pytest.mark.parametrize(("category", "other"), [(3, 8), (8, 3)])
    def test_classes(self, evaluator, category, other):
        """Both objects are detected as the class of the first: one detection is right, the other wrong."""
        boxes = [(0, 0, 50, 50), (100, 0, 50, 50)]
        truth = self.truth(boxes, [category, other])
        metrics, per_class = average_precision(truth, self.found(boxes, [category, category]), evaluator)
        assert per_class[category] == pytest.approx({"AP": 1.0, "AP50": 1.0})
        assert per_class[other] == {"AP": 0.0, "AP50": 0.0}
        assert metrics["AP"] == pytest.approx(0.5)
