"""The same data in other layouts and formats is the same data."""

import hashlib
import json
import logging
import re

import folders
import layouts
import numpy as np
import pytest
import supervision
import tiny

from hpr_jax.commands.check_data import check_data
from hpr_jax.data.build import load_dataset, load_training_data
from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.recognize import COCO_NAMES, names_leave_open, recognize
from hpr_jax.data.sources.source import choose_splits, validates
from hpr_jax.errors import UserError


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Shapes in COCO's own layout."""
    return layouts.shapes(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shapes whose boxes are in whole pixels."""
    return layouts.shapes(tmp_path_factory.mktemp("whole"), whole=True)


def same(found, expected, tolerance=0.0):
    """Both have the same images, objects by the names of their classes, masks and ground truth."""
    assert len(found) == len(expected)
    assert found.sizes.tolist() == expected.sizes.tolist()
    for one, other in zip(found.records, expected.records, strict=True):
        assert [found.classes.names[label] for label in one.labels] == [
            expected.classes.names[label] for label in other.labels
        ]
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=tolerance)
        assert len(one.masks) == len(other.masks)
        for mask, known in zip(one.masks, other.masks):
            np.testing.assert_allclose(np.concatenate(mask), np.concatenate(known), rtol=0, atol=tolerance)
        assert one.image.read() == other.image.read()
    np.testing.assert_array_equal(found.truth.images, expected.truth.images)
    np.testing.assert_array_equal(found.truth.crowd, expected.truth.crowd)
    np.testing.assert_allclose(found.truth.boxes, expected.truth.boxes, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.truth.areas, expected.truth.areas, rtol=1e-3 if tolerance else 0, atol=tolerance)


class TestRoundTrips:
    def test_roboflow_coco(self, coco, tmp_path):
        """It is the same to the last bit, and has the same fingerprint."""
        target = layouts.to_roboflow_coco(coco, tmp_path / "data")
        for found, expected in zip(layouts.load(target, masks=True), layouts.load(coco, masks=True)):
            same(found, expected)
            assert found.fingerprint == expected.fingerprint
            assert found.classes == expected.classes
            assert found.origin == "COCO as Roboflow exports it"

    def test_yolo_boxes(self, coco, tmp_path):
        target = layouts.to_yolo(coco, tmp_path / "data")
        for split in layouts.SPLITS:
            # Without polygons, evaluators take the areas of the boxes.
            folders.edit(target_of(coco, tmp_path / "boxes"), without_masks, split)
        for found, expected in zip(layouts.load(target), layouts.load(tmp_path / "boxes")):
            same(found, expected, 1e-5)

    def test_yolo_polygons(self, coco, tmp_path):
        """Boxes of polygons are their hulls, as those of the shapes are up to their two digits."""
        target = layouts.to_yolo(coco, tmp_path / "data", polygons=True)
        for found, expected in zip(layouts.load(target, masks=True), layouts.load(coco, masks=True)):
            same(found, expected, 0.011)
            assert found.count_masks()[0] == found.count_masks()[1] > 0

    @pytest.mark.parametrize("roboflow", [False, True])
    def test_voc(self, whole, tmp_path, roboflow):
        """Boxes in whole pixels are the same to the last bit; classes are the sorted names."""
        target = layouts.to_voc(whole, tmp_path / "data", roboflow=roboflow)
        for found, expected in zip(layouts.load(target), layouts.load(whole)):
            same(found, expected)
            assert found.classes == Classes(("circle", "square", "star", "triangle"), (1, 2, 3, 4))

    def test_other_formats_have_the_fingerprint_of_coco_files(self, coco, whole, tmp_path):
        """Whoever writes what was parsed to a COCO file has the same data, and the same checks."""
        for target in (layouts.to_yolo(coco, tmp_path / "yolo"), layouts.to_voc(whole, tmp_path / "voc")):
            content = recognize(target).splits["val"](None)
            text = json.dumps(
                {
                    "images": [image for image, _ in content.entries],
                    "annotations": [one for _, annotations in content.entries for one in annotations],
                    "categories": content.categories,
                }
            )
            assert layouts.load(target)[1].fingerprint == hashlib.sha256(text.encode()).hexdigest()

    def test_yolo_is_that_of_supervision(self, coco, tmp_path):
        for polygons in (False, True):
            target = layouts.to_yolo(coco, tmp_path / f"data{polygons}", polygons=polygons)
            for split, dataset in zip(layouts.SPLITS, layouts.load(target)):
                oracle = supervision.DetectionDataset.from_yolo(
                    str(target / "images" / split), str(target / "labels" / split), str(target / "data.yaml")
                )
                compare(dataset, oracle, 1e-3)

    def test_voc_is_that_of_supervision(self, whole, tmp_path):
        target = layouts.to_voc(whole, tmp_path / "data", roboflow=True)
        for folder, dataset in zip(("train", "valid"), layouts.load(target)):
            oracle = supervision.DetectionDataset.from_pascal_voc(str(target / folder), str(target / folder))
            compare(dataset, oracle, 0)


def target_of(coco, target):
    """A copy of the shapes that a test may change."""
    return target if target.exists() else layouts.shapes(target)


def without_masks(content):
    for one in content["annotations"]:
        del one["segmentation"], one["area"]


def compare(dataset, oracle, tolerance):
    """Supervision finds the same boxes and classes. It does not clip boxes, and those of shapes need not be."""
    known = {path.rpartition("/")[2]: detections for path, _, detections in oracle}
    assert len(known) == len(dataset)
    for record in dataset.records:
        detections = known[record.image.path.name]
        np.testing.assert_allclose(record.boxes, detections.xyxy, rtol=0, atol=tolerance)
        names = [dataset.classes.names[label] for label in record.labels]
        assert names == [oracle.classes[label] for label in detections.class_id]


@pytest.mark.parametrize("form", [layouts.to_roboflow_coco, layouts.to_yolo, layouts.to_voc])
def test_data_is_checked(form, whole, tmp_path, capsys):
    """`check-data` opens all images, counts boxes, and finds the data fit."""
    config = tiny.config(form(whole, tmp_path / "data"))
    assert check_data(config, tmp_path / "output", 0).fit
    said = capsys.readouterr().out
    assert sum(" images, 4 classes." in line for line in said.splitlines()) == 1
    counts = [len(layouts.content(whole, split)["annotations"]) for split in layouts.SPLITS]
    assert re.findall(r"objects +(\d+), and 0 crowds", said) == [str(count) for count in counts]
    assert said.count("0 boxes\n") == said.count("0 unreadable") == said.count("0 missing") == 2


class TestSentences:
    """What was recognised is told in one line, and what is near if nothing was."""

    def test_what_was_recognised(self, coco, whole, tmp_path, caplog):
        caplog.set_level(logging.INFO, "hpr_jax")
        yolo, voc = layouts.to_yolo(coco, tmp_path / "yolo"), layouts.to_voc(whole, tmp_path / "voc")
        for directory, name in ((coco, "COCO"), (yolo, "YOLO"), (voc, "Pascal VOC")):
            caplog.clear()
            load_training_data(tiny.config(directory))
            (message,) = caplog.messages
            assert message == f"{directory} is read as {name}: 6 training and 3 validation images, 4 classes."

    def test_a_split_that_was_made(self, coco, tmp_path, caplog):
        target = layouts.to_yolo(coco, tmp_path / "data")
        edit(target / "data.yaml", "val: images/val\n", "")
        caplog.set_level(logging.INFO, "hpr_jax")
        train, val = load_training_data(tiny.config(target))
        assert f"is read as YOLO, split by config.data.val_fraction=0.2: {len(train)} training and {len(val)}" in caplog.text

    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda d: None, "there are neither images nor annotations."),
            (lambda d: write(d / "a.jpg"), "there are images, but no annotations."),
            (lambda d: write(d / "train.json", "{}"), "the JSON of 'train.json' has no lists of images, annotations and"),
            (
                lambda d: write(d / "labels/train/a.txt"),
                r"labels looks like YOLO's labels, but there is no .*data.yaml, which",
            ),
            (
                lambda d: write(d / "Annotations/a.xml"),
                "has annotations of Pascal VOC, but there is no folder .*/JPEGImages.",
            ),
            (lambda d: write(d / "JPEGImages/a.jpg"), "has images as Pascal VOC has them, but there is no folder"),
            (lambda d: write(d / "x/data.yaml", "names: [a]\ntrain: i"), "has a data set below it; set .*directory=.*/x.$"),
            (lambda d: write(d / "x/y/data.yaml", "names: ["), "has a data set below it; set .*directory=.*/x/y.$"),
        ],
    )
    def test_what_is_near(self, tmp_path, make, sentence):
        make(tmp_path)
        for split in layouts.SPLITS:
            with pytest.raises(UserError, match=sentence):
                load_dataset(folders.settings(tmp_path), split)


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


class TestSettings:
    def test_the_names_of_coco_are_the_defaults(self):
        data = tiny.config().data
        assert {key: data[key] for key in COCO_NAMES} == COCO_NAMES

    def test_named_files_are_read_whatever_else_is_there(self, coco, tmp_path):
        target = layouts.to_yolo(coco, tmp_path / "data")
        layouts.to_roboflow_coco(coco, target)
        names = {f"{split}_images": folder for split, folder in (("train", "train"), ("val", "valid"))}
        names |= {key.replace("images", "annotations"): f"{name}/_annotations.coco.json" for key, name in names.items()}
        train, val = layouts.load(target, **names)
        assert (train.origin, val.name) == ("COCO", str(target / "valid/_annotations.coco.json"))
        with pytest.raises(UserError, match=r"The annotation file .*/x.json does not exist; set config.data"):
            layouts.load(target, **{**names, "train_annotations": "x.json"})

    def test_a_split_in_own_layout_leaves_nothing_open(self, coco, tmp_path):
        target = target_of(coco, tmp_path / "data")
        layouts.to_yolo(coco, target)
        data = folders.settings(target)
        (target / "annotations/instances_train2017.json").unlink()
        assert not names_leave_open(target, data)
        with pytest.raises(UserError, match=r"The annotation file .* does not exist"):
            load_dataset(data, "train")
        assert load_dataset(data, "val").origin == "COCO"
        (target / "annotations/instances_val2017.json").unlink()
        assert load_dataset(data, "train").origin == "YOLO"

    def test_directories_of_tfds_are_read_as_such(self, tfds_directory):
        write(tfds_directory / "train/_annotations.coco.json", '{"images": [], "annotations": [], "categories": []}')
        assert load_dataset(folders.settings(tfds_directory), "train").origin == "TFDS"


class TestSplits:
    def test_words(self):
        assert choose_splits(dict.fromkeys(("train", "valid", "test"), 0)) == ({"train": 0, "val": 0}, "")
        assert choose_splits({"train": 1, "test": 2}) == ({"train": 1, "val": 2}, ", with test for validation")
        assert choose_splits({"trainval": 1, "val": 2}) == ({"train": 1}, "")
        assert choose_splits({"trainval": 1, "val": 2, "test": 3})[0] == {"train": 1, "val": 3}
        assert choose_splits({"train": 1, "val": 2, "trainval": 3})[0] == {"train": 1, "val": 2}
        assert choose_splits({"valid": 1})[0] == {"val": 1}
        assert choose_splits({}) == ({}, "")

    def test_parts_depend_on_names_alone(self):
        names = [f"{number:05}.jpg" for number in range(2000)]
        chosen = dict(zip(names, validates(names, 0.2)))
        assert sum(chosen.values()) == pytest.approx(400, abs=60)
        shuffled = list(np.random.default_rng(0).permutation(names)) + ["new.jpg"]
        assert {name: val for name, val in zip(shuffled, validates(shuffled, 0.2)) if name != "new.jpg"} == chosen
        # More of them stay in what was validated on before.
        larger = dict(zip(names, validates(names, 0.5)))
        assert all(larger[name] for name in names if chosen[name])

    def test_values_stay_what_they_were(self):
        """They decide what runs have trained on."""
        chosen = validates([f"{number}.jpg" for number in range(40)], 0.3)
        assert [number for number, val in enumerate(chosen) if val] == [0, 1, 5, 14, 19, 26, 34, 35, 36, 38]

    def test_one_image_at_least_is_in_each_part(self):
        for fraction in (1e-9, 0.5, 1 - 1e-9):
            for count in (2, 3, 10):
                assert 0 < sum(validates([str(number) for number in range(count)], fraction)) < count

    def test_copies_of_an_image_stay_together(self):
        names = [f"{number}_jpg.rf.{copy}0af.jpg" for number in range(50) for copy in "abc"]
        chosen = validates(names, 0.3)
        assert all(len(set(chosen[start : start + 3])) == 1 for start in range(0, 150, 3))
        assert len(set(chosen)) == 2

    def test_a_single_image_cannot_be_split(self, tmp_path):
        image = {"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}
        write(
            tmp_path / "all.json", json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]})
        )
        write(tmp_path / "a.jpg")
        with pytest.raises(
            UserError, match=r"all.json has 1 images, too few for one to train on and another to validate on"
        ):
            load_dataset(folders.settings(tmp_path), "train")
