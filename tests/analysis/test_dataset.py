"""Facts about data sets, as values; tests of the command check-data see them printed."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from pictures import RED, dataset, plain

from hpr_jax.analysis.data_verdict import Verdict, first_few
from hpr_jax.analysis.dataset import (
    MISSING,
    OTHER_SIZE,
    UNREADABLE,
    OpenedImage,
    Overlap,
    Spread,
    annotation_facts,
    by_reason,
    compare_splits,
    count_below,
    find_copies,
    open_images,
    plan_facts,
    training_obstacle,
)
from hpr_jax.data.augmentation.crop_resize_flip import evaluation_geometries
from hpr_jax.data.build import load_dataset
from hpr_jax.data.dataset import Problem
from hpr_jax.data.loading.batch_plan import TrainPlan


@pytest.fixture
def directory(tmp_path):
    return tiny.write_coco(tmp_path / "data")


def load(directory, split="train"):
    return load_dataset(tiny.config(directory).data, split)


def test_annotations(directory, capsys):
    path = directory / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    first, second, third, *_ = content["annotations"]
    first["bbox"], second["bbox"], third["bbox"] = [-2, 0, 42, 30], [1, 1, 5, 5], [2, 2, 50, 48]
    content["images"][4]["file_name"] = "3.jpg"
    path.write_text(json.dumps(content))
    dataset = load(directory)
    facts = annotation_facts(dataset)
    assert (facts.images, facts.empty, facts.objects, facts.crowds) == (6, 1, 10, 1)
    assert facts.objects_per_image == Spread(0, 2, 2)
    assert facts.fullest.endswith("0.jpg")
    assert (facts.widths, facts.heights) == (Spread(60, 60, 60), Spread(48, 48, 48))
    # 40 x 30 and 50 x 46 pixels are left of the first and the third box; 32 x 32 are no longer small.
    assert (facts.boxes.small, facts.boxes.medium, facts.boxes.large) == (8, 2, 0)
    assert facts.boxes.widths == Spread(5, 20, 50)
    assert (facts.boxes.clipped, facts.boxes.beyond) == (2, Spread(2, 2, 2))
    assert (facts.class_counts, facts.absent) == ((5, 5, 0), ("hat",))
    assert (facts.repeated_names, facts.file_names) == (("3.jpg",), {f"{number}.jpg" for number in (0, 1, 2, 3, 5)})
    assert (count_below(dataset, 48), count_below(dataset, 49)) == (0, 6)
    assert capsys.readouterr().out == ""


def test_images_with_one_object_are_not_empty():
    box = [2, 2, 12, 12]
    facts = annotation_facts(dataset([plain(20, 30, RED)] * 4, [[], [box], [box] * 3, [box]]))
    assert (facts.empty, facts.objects, facts.objects_per_image) == (1, 5, Spread(0, 1, 3))


def test_every_repetition_of_an_id_counts(directory):
    path = directory / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for annotation, number in zip(content["annotations"], (7, 7, 7, 8, 8)):
        annotation["id"] = number
    for number, annotation in enumerate(content["annotations"][5:], start=100):
        annotation["id"] = number
    path.write_text(json.dumps(content))
    assert annotation_facts(load(directory)).repeated_ids == 3


def test_a_split_without_images(directory):
    path = directory / "annotations/instances_train2017.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": [], "annotations": []}))
    facts = annotation_facts(load(directory))
    assert (facts.images, facts.objects, facts.fullest, facts.class_counts) == (0, 0, "", (0, 0, 0))
    assert facts.boxes.widths == facts.objects_per_image == Spread(0, 0, 0)


def test_opened_images(directory):
    train = directory / "train2017"
    shutil.copy(train / "0.jpg", train / "5.jpg")
    (train / "1.jpg").unlink()
    (train / "2.jpg").write_bytes(b"broken")
    tiny.write_turned(train / "3.jpg", np.zeros((20, 30, 3), np.uint8), 1)
    shutil.copy(train / "0.jpg", directory / "val2017/2.jpg")
    dataset, val = load(directory), load(directory, "val")
    images, val_images = list(open_images(dataset, threads=2)), list(open_images(val, threads=2))
    assert [image.failure for image in images] == ["", MISSING, UNREADABLE, OTHER_SIZE, "", ""]
    assert [bool(image.digest) for image in images] == [True, False, False, False, True, True]
    assert find_copies(images) == [(str(train / "0.jpg"), str(train / "5.jpg"))]
    overlap = compare_splits(annotation_facts(dataset), annotation_facts(val), images, val_images)
    assert overlap == Overlap(("0.jpg", "1.jpg", "2.jpg"), (str(directory / "val2017/2.jpg"),))
    assert training_obstacle(images, dataset) == ""
    # Images 1 to 3 alone would be trained on. If no image can be read, the verdict says so of the whole split.
    some = dataclasses.replace(dataset, records=dataset.records.take(np.arange(1, 4)))
    assert training_obstacle(images, some) == "none of the images that training would use can be read"
    assert training_obstacle([OpenedImage(image.name, "") for image in images], some) == ""
    assert training_obstacle(images, dataset.subset(keep_empty=True, min_side=49)) == "no object is left to train on"


def test_an_epoch():
    sizes = np.array([[32, 64]] * 3 + [[64, 64]])
    plan = TrainPlan(
        lambda rng: evaluation_geometries(sizes, 64, 64), 4, batch_size=1, buckets=[(32, 64), (64, 64), (64, 96)], seed=0
    )
    facts = plan_facts(plan)
    assert (facts.steps, facts.images_per_step) == (4, 1)
    assert facts.batches == {(32, 64): 3, (64, 64): 1, (64, 96): 0}
    assert facts.padding == 0


def test_problems_by_reason():
    problems = [Problem("a", "is small"), Problem("b", "is wide"), Problem("c", "is wide")]
    assert list(by_reason(problems).items()) == [("is wide", ["b", "c"]), ("is small", ["a"])]
    assert first_few(["a", "b", "c", "d", "e"]) == ["a", "b", "c", "and 2 more"]


def test_verdicts():
    verdict = Verdict()
    assert (verdict.fit, str(verdict)) == (True, "Fit to train.")
    verdict.doubt("images missing", 0)
    verdict.doubt("images unreadable", 1200, "others take their place")
    assert (verdict.fit, str(verdict)) == (True, "Fit to train, but: images unreadable: 1,200 (others take their place).")
    verdict.judge_room(room=3, most=3)
    assert len(verdict.doubts) == 1
    verdict.obstacles += ["there are no images.", "nor objects"]
    assert (verdict.fit, str(verdict)) == (False, "Not fit to train: there are no images; nor objects.")
