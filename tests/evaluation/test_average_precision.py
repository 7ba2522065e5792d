"""Average precision: both evaluators give the same numbers, also for unusual annotations and detections."""

import copy

import numpy as np
import pytest

from hpr_jax.evaluation.average_precision import NAMES, coco_average_precision


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
    pytest.importorskip("hotcoco", reason="the extra fast-eval is not installed")
    truth, objects = annotations
    found = noisy(objects)
    slow, slow_classes = coco_average_precision(truth, found, "pycocotools")
    fast, fast_classes = coco_average_precision(truth, found, "hotcoco")
    assert list(slow) == list(NAMES)
    assert 0.1 < slow["AP"] < 0.9
    for name in NAMES:
        assert fast[name] == pytest.approx(slow[name], abs=1e-9), name
    for category in (3, 8, 11):
        assert fast_classes[category] == pytest.approx(slow_classes[category], abs=1e-9)
    assert slow_classes[11] == {"AP": -1.0, "AP50": -1.0}


def test_perfect_detections(annotations):
    truth, objects = annotations
    found = [{**o, "score": 0.9} for o in objects if not o["iscrowd"]]
    metrics, per_class = coco_average_precision(truth, found, "pycocotools")
    assert metrics["AP"] == pytest.approx(1.0)
    assert per_class[3]["AP"] == pytest.approx(1.0)


def test_no_detections(annotations):
    truth, _ = annotations
    metrics, per_class = coco_average_precision(truth, [])
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
    expected, _ = coco_average_precision(truth, found, evaluator)
    content = copy.deepcopy(truth)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["id"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    broken = {"image_id": 0, "category_id": 3}
    content["annotations"] += [{**broken, "bbox": [1, 2, 3]}, {**broken, "bbox": [1, 2, float("inf"), 3]}]
    assert coco_average_precision(content, found, evaluator)[0] == expected


@pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
@pytest.mark.parametrize("number", [lambda place: place, lambda place: 1])
def test_ids_of_objects_do_not_count(annotations, evaluator, number):
    """An id of 0 and ids that occur twice change nothing."""
    truth, objects = annotations
    found = noisy(objects)
    expected, _ = coco_average_precision(truth, found, evaluator)
    content = copy.deepcopy(truth)
    for place, annotation in enumerate(content["annotations"]):
        annotation["id"] = number(place)
    assert coco_average_precision(content, found, evaluator)[0] == expected
