"""COCO files as exporters write them: what is harmless changes no number, and anything else gets a sentence."""

import copy
import json
import math

import cv2
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mutations import accepted, changed_documents, evaluated_alike, examples, refused
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hpr_jax.data.build import load_training_data
from hpr_jax.data.sources.coco import load_coco
from hpr_jax.errors import UserError
from hpr_jax.evaluation.average_precision import coco_average_precision, metric_names

ANNOTATIONS = "annotations/instances_val2017.json"
EVALUATORS = ("pycocotools", "hotcoco")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A COCO folder, whose annotation file of the validation split each test writes anew."""
    return tiny.write_coco(tmp_path_factory.mktemp("exports") / "data", val=5)


@pytest.fixture(scope="module")
def clean(folder):
    """Annotations as COCO has them: the impossible box is left out, and one box reaches beyond its image."""
    content = json.loads((folder / ANNOTATIONS).read_text())
    content["annotations"] = [a for a in content["annotations"] if a["bbox"][2]]
    content["annotations"][1]["bbox"][0] = 50
    for annotation in content["annotations"]:
        annotation["area"] *= 0.7
    return content


def load(folder, content):
    (folder / ANNOTATIONS).write_text(json.dumps(content))
    return load_coco(folder, "val2017", ANNOTATIONS)


def detections(content):
    """Three for each annotation, with other boxes and random scores."""
    rng = np.random.default_rng(0)
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": (np.array(a["bbox"]) + rng.uniform(-3, 3, 4)).tolist(),
            "score": float(rng.random()),
        }
        for a in content["annotations"] * 3
    ]


def numbers(folder, content, found=None, evaluator="hotcoco"):
    """The twelve numbers and those by class name."""
    dataset = load(folder, content)
    metrics, per_category = coco_average_precision(dataset, found or detections(content), evaluator)
    names = dict(zip(dataset.classes.category_ids, dataset.classes.names))
    return metrics, {names[category]: value for category, value in per_category.items()}


@pytest.fixture(scope="module")
def expected(folder, clean):
    return {evaluator: numbers(folder, clean, evaluator=evaluator) for evaluator in EVALUATORS}


def test_numbers_of_a_clean_file_are_those_of_pycocotools(folder, clean, expected, capsys):
    (folder / ANNOTATIONS).write_text(json.dumps(clean))
    truth = COCO(str(folder / ANNOTATIONS))
    evaluation = COCOeval(truth, truth.loadRes(detections(clean)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    for evaluator in EVALUATORS:
        assert list(expected[evaluator][0].values()) == pytest.approx(list(evaluation.stats), abs=1e-12)
    assert 0.1 < expected["pycocotools"][0]["AP"] < 0.9


def everywhere(kind, **fields):
    def change(content):
        for entry in content[kind]:
            entry.update(fields)

    return change


def without(kind, *names):
    def change(content):
        for entry in content[kind]:
            for name in names:
                entry.pop(name, None)

    return change


def number(kind, make):
    def change(content):
        for place, entry in enumerate(content[kind]):
            entry["id"] = make(place)

    return change


HARMLESS = {
    "no info": lambda c: c.update(info="my data", licenses=None),
    "info of numbers": lambda c: c.update(info=[1], licenses={"a": 1}, type=3, categories_=[]),
    "Roboflow's info": lambda c: c.update(
        info={"year": "2024", "version": "1", "description": "", "contributor": "", "url": "", "date_created": ""}
    ),
    "CVAT's info": lambda c: c.update(
        info={"year": "", "version": "", "date_created": ""}, licenses=[{"id": 0, "name": ""}]
    ),
    "fields of images": everywhere("images", license=0, flickr_url="", coco_url="", date_captured=0, extra={"a": [1]}),
    "null fields": everywhere("images", license=None, coco_url=None, date_captured=None),
    "sides as text": everywhere("images", width="60", height="48"),
    "sides as fractions": everywhere("images", width=60.0, height=48.4),
    "supercategories": everywhere("categories", supercategory=3, keypoints=None, skeleton="none"),
    "annotations with more": everywhere("annotations", score=None, attributes={"occluded": False}, track_id="x"),
    "segmentation of nothing": everywhere("annotations", segmentation={}),
    "segmentation of text": everywhere("annotations", segmentation="mask.png"),
    "a flat segmentation": everywhere("annotations", segmentation=[1, 2, 3, 4, 5, 6]),
    "ids all the same": number("annotations", lambda place: 0),
    "ids that are null": number("annotations", lambda place: None),
    "ids that are text": number("annotations", str),
    "ids that are lists": number("annotations", lambda place: [place]),
    "no ids": without("annotations", "id"),
    "crowds as text": lambda c: [a.update(iscrowd=str(a["iscrowd"])) for a in c["annotations"]],
    "crowds as words": lambda c: [a.update(iscrowd=("False", "true")[a["iscrowd"]]) for a in c["annotations"]],
    "crowds as truth": lambda c: [a.update(iscrowd=bool(a["iscrowd"])) for a in c["annotations"]],
    "crowds as null": lambda c: [a.update(iscrowd=a["iscrowd"] or None) for a in c["annotations"]],
    "crowds as fractions": lambda c: [a.update(iscrowd=float(a["iscrowd"])) for a in c["annotations"]],
    "areas as text": lambda c: [a.update(area=f" {a['area']!r} ") for a in c["annotations"]],
    "boxes as text": lambda c: [a.update(bbox=[str(side) for side in a["bbox"]]) for a in c["annotations"]],
    "an unused category": lambda c: c["categories"].append({"id": 77, "name": "unused", "supercategory": None}),
    "an impossible box": lambda c: c["annotations"].append({"image_id": 7, "category_id": 9, "bbox": [1, 2, 3]}),
    "a crowd without a box": lambda c: c["annotations"].append({"image_id": 7, "category_id": 9, "iscrowd": 1}),
}


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_is_harmless_changes_no_number(folder, clean, expected, evaluator, change):
    content = copy.deepcopy(clean)
    change(content)
    metrics, per_class = numbers(folder, content, detections(clean), evaluator)
    per_class.pop("unused", None)
    assert (metrics, per_class) == expected[evaluator]


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("area", [None, -1, "", "large", math.inf, math.nan, [], 1e12, True, 0])
def test_without_an_area_it_is_that_of_the_box(folder, clean, evaluator, area):
    content = copy.deepcopy(clean)
    for annotation in content["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    expected = numbers(folder, content, evaluator=evaluator)
    for annotation in content["annotations"]:
        annotation["area"] = area
    assert numbers(folder, content, evaluator=evaluator) == expected
    truth = load(folder, content).truth
    assert truth is not None
    objects = ~truth.crowd.astype(bool)
    np.testing.assert_allclose(truth.areas[objects], truth.boxes[objects, 2:].prod(axis=1))


IDS = {
    "from 0": lambda place: place,
    "negative": lambda place: place - 100,
    "text": lambda place: f"image-{place:03}",
    "text of numbers": lambda place: str(place),
    "of two types": lambda place: place if place % 2 else f"{place:03}",
    "huge": lambda place: 10**30 + place,
    "fractions": lambda place: float(place),
}


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("make", IDS.values(), ids=IDS)
@pytest.mark.parametrize("kind", ["images", "categories"])
def test_ids_may_be_any(folder, clean, expected, evaluator, make, kind):
    """What is detected has the ids of the file, in its form."""
    content, found = copy.deepcopy(clean), detections(clean)
    key = {"images": "image_id", "categories": "category_id"}[kind]
    new = {entry["id"]: make(place) for place, entry in enumerate(content[kind])}
    for entry in content[kind]:
        entry["id"] = new[entry["id"]]
    for entry in (*content["annotations"], *found):
        entry[key] = new[entry[key]]
    metrics, per_class = numbers(folder, content, found, evaluator)
    for name in metric_names():
        assert metrics[name] == pytest.approx(expected[evaluator][0][name], abs=1e-12)
    assert per_class == expected[evaluator][1]
    dataset = load(folder, content)
    assert list(dataset.records.image_ids) == [image["id"] for image in content["images"]]


def test_an_empty_split_has_no_numbers(folder, clean):
    content = {**clean, "images": [], "annotations": []}
    for evaluator in EVALUATORS:
        metrics, per_category = coco_average_precision(load(folder, content), [], evaluator)
        assert set(metrics.values()) == {-1.0}
        assert per_category == {number: {"AP": -1.0, "AP50": -1.0} for number in (2, 5, 9)}


# One file in the style of each exporter: of three images with two cups each, the middle one without any.
def roboflow() -> dict:
    info = {"year": "2024", "version": "3", "description": "", "contributor": "", "url": "", "date_created": "2024-05-01"}
    images = [
        {
            "id": i,
            "license": 1,
            "file_name": f"{i}.jpg",
            "height": 48,
            "width": 60,
            "date_captured": "2024-05-01T00:00:00+00:00",
        }
        for i in range(3)
    ]
    # The first category is the project, which has no objects.
    categories = [{"id": 0, "name": "cups", "supercategory": "none"}, {"id": 1, "name": "cup", "supercategory": "cups"}]
    objects = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": [x, 5, 20, 15.5], "area": 310, "segmentation": [], "iscrowd": 0}
        for n, (i, x) in enumerate((i, x) for i in (0, 2) for x in (3, 30))
    ]
    licenses = [{"id": 1, "url": "https://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"}]
    return {"info": info, "licenses": licenses, "categories": categories, "images": images, "annotations": objects}


def cvat() -> dict:
    content = roboflow()
    content["info"] = dict.fromkeys(("contributor", "date_created", "description", "url", "version", "year"), "")
    content["licenses"] = [{"name": "", "id": 0, "url": ""}]
    content["categories"] = [{"id": 1, "name": "cup", "supercategory": ""}]
    for image in content["images"]:
        image.update(id=image["id"] + 1, license=0, flickr_url="", coco_url="", date_captured=0)
    for one in content["annotations"]:
        one.update(id=one["id"] + 1, image_id=one["image_id"] + 1, attributes={"occluded": False, "rotation": 0.0})
    return content


def label_studio() -> dict:
    content = roboflow()
    content["info"] = {"year": 2024, "version": "1.0", "description": "", "contributor": "Label Studio", "url": ""}
    content["categories"] = [{"id": 0, "name": "cup"}]
    for image in content["images"]:
        image["file_name"] = f"images\\{image['file_name']}"
    for one in content["annotations"]:
        one.update(category_id=0, ignore=0)
    del content["licenses"]
    return content


def labelme2coco() -> dict:
    content = roboflow()
    del content["info"], content["licenses"]
    content["categories"] = [{"id": 0, "name": "cup", "supercategory": "cup"}]
    for one in content["annotations"]:
        x, y, w, h = one["bbox"]
        one.update(category_id=0, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]], area=float(w * h))
    return content


def fiftyone() -> dict:
    content = roboflow()
    content["info"] = {"year": "", "version": "", "description": "Exported from FiftyOne", "url": None, "contributor": ""}
    content["licenses"] = []
    content["categories"] = [{"id": 0, "name": "cup", "supercategory": None}]
    for image in content["images"]:
        image.update(id=image["id"] + 1, license=None, coco_url=None)
        del image["date_captured"]
    for one in content["annotations"]:
        one.update(id=one["id"] + 1, image_id=one["image_id"] + 1, category_id=0)
        del one["segmentation"]
    return content


def supervision() -> dict:
    content = roboflow()
    content["info"] = {}
    content["licenses"] = [{"id": 1, "url": "https://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"}]
    content["categories"] = [{"id": 0, "name": "cup", "supercategory": "common-objects"}]
    for one in content["annotations"]:
        one.update(category_id=0, area=one["bbox"][2] * one["bbox"][3])
    return content


EXPORTERS = (roboflow, cvat, label_studio, labelme2coco, fiftyone, supervision)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_files_of_exporters(exporter, tmp_path):
    """Both splits are read, the images are found, and both evaluators count what is found."""
    content = exporter()
    for split in ("train2017", "val2017"):
        for image in content["images"]:
            path = tmp_path / split / image["file_name"].replace("\\", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.zeros((48, 60, 3), np.uint8))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    train, val = load_training_data(tiny.config(tmp_path))
    for dataset in (train, val):
        assert "cup" in dataset.classes.names
        assert dataset.records.counts.tolist() == [2, 0, 2]
        assert not dataset.dropped_boxes
        assert all(record.image.path.is_file() for record in dataset.records)
        np.testing.assert_array_equal(dataset.records[0].boxes, [[3, 5, 23, 20.5], [30, 5, 50, 20.5]])
    found = [{**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9} for a in content["annotations"]]
    for evaluator in EVALUATORS:
        metrics, _ = coco_average_precision(val, found, evaluator)
        assert (metrics["AP"], metrics["AP_small"], metrics["AP_medium"]) == pytest.approx((1, 1, -1))


@examples(150, 10_000)
@given(st.data())
def test_any_change_is_understood_or_gets_a_sentence(folder, clean, data):
    """What is accepted can be evaluated."""
    try:
        dataset = load(folder, data.draw(changed_documents(clean)))
    except UserError as error:
        refused(error)
        return
    accepted()
    evaluated_alike(dataset)
    assert all(record.boxes.shape == (len(record.labels), 4) for record in dataset.records)
    assert np.all(np.isfinite(dataset.records.boxes))
