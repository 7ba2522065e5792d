"""The evaluator, with known detections: from padded batches to COCO results in pixels of the originals, and to AP."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from flax import nnx
from pictures import BLUE, CLASSES, GREEN, RED, dataset, plain, png

import hpr_jax
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.evaluation.evaluate import evaluate
from hpr_jax.evaluation.evaluator import EvaluationResult, Evaluator, log_table


class Detect:
    """Stands for a compiled detector: `find(height, width)` returns boxes, scores and labels for an image of this size."""

    def __init__(self, find):
        self.find = find
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, state, images, sizes):
        images, sizes = np.asarray(images), np.asarray(sizes)
        self.batches.append((images, sizes))
        boxes, scores, labels = zip(*(self.find(*map(int, size)) for size in sizes))
        valid = np.ones(np.shape(labels), bool)
        return np.array(boxes, np.float32), np.array(scores, np.float32), np.array(labels, np.int32), valid


def whole_image(height, width):
    """Detections of the whole valid area, and of its lower right quarter."""
    return [(0, 0, width, height), (width / 2, height / 2, width, height)], (0.75, 0.5), (0, 2)


def run(pictures, find=whole_image, **settings):
    """Evaluates known detections; returns the result, and the images and sizes of each batch."""
    config = tiny.config()
    config.evaluate.update(batch_size=2, side=64, max_side=64, buckets=2, evaluator="pycocotools")
    config.evaluate.update(settings)
    evaluator = Evaluator(config, pictures, nnx.split(nnx.Module())[0])
    detect: Any = Detect(find)
    evaluator.detect = detect
    return evaluator.run(nnx.State({})), detect.batches


# Sizes (height, width) of images: portrait, landscape, square, larger and smaller than the input. They fill two buckets.
SHAPES = [(100, 80), (80, 100), (64, 64), (256, 128), (16, 32)]


class TestBoxesInPixelsOfTheOriginals:
    @pytest.mark.parametrize("settings", [{}, {"batch_size": 5, "buckets": 1}, {"side": 32, "max_side": 48}])
    def test_each_image_has_its_own_scale(self, settings):
        result, _ = run(dataset([plain(*shape, RED) for shape in SHAPES], [[]] * len(SHAPES)), **settings)
        found: dict[int, list[list[float]]] = {}
        for one in result.detections:
            found.setdefault(one["image_id"], []).append(one["bbox"])
        assert found.keys() == {10, 11, 12, 13, 14}
        for image_id, (height, width) in enumerate(SHAPES, start=10):
            # COCO's boxes are left, top, width and height.
            expected = np.array([[0, 0, width, height], [width / 2, height / 2, width / 2, height / 2]])
            np.testing.assert_allclose(found[image_id], expected, atol=2e-3)

    def test_on_a_canvas(self):
        """An image of 100 x 80 takes the upper left 64 x 51 of a canvas of 96 x 96."""
        result, batches = run(
            dataset([plain(100, 80, RED)], [[]]),
            lambda *size: ([(0, 0, 51, 64), (25.5, 32, 51, 64)], (0.75, 0.5), (0, 1)),
            canvas=96,
        )
        assert batches[0][1].tolist() == [[96, 96], [1, 1]]
        assert [one["bbox"] for one in result.detections] == [[0, 0, 80, 100], [40, 50, 40, 50]]

    @pytest.mark.parametrize("stored", [False, True])
    def test_of_turned_photographs(self, tmp_path, stored):
        """Annotations may refer to the photograph as it is seen, or as it is stored."""
        tiny.write_turned(tmp_path / "x.jpg", plain(80, 100, RED), 6)
        seen = plain(80, 100, RED) if stored else plain(100, 80, RED)
        result, batches = run(dataset([seen], [[]], encoded=[(tmp_path / "x.jpg").read_bytes()]))
        assert batches[0][1][0].tolist() == ([51, 64] if stored else [64, 51])
        assert result.detections[0]["bbox"] == ([0, 0, 100, 80] if stored else [0, 0, 80, 100])


class TestDetections:
    def test_categories_are_those_of_the_labels(self):
        def find(height, width):
            return [(0, 0, 8, 8)] * 3, (0.75, 0.5, 0.25), (2, 0, 1)

        result, _ = run(dataset([plain(64, 64, RED)], [[]]), find)
        assert [(one["category_id"], one["score"]) for one in result.detections] == [(9, 0.75), (2, 0.5), (5, 0.25)]
        turned = Classes(("hat", "cup", "pen"), (9, 2, 5))
        result, _ = run(dataset([plain(64, 64, RED)], [[]], classes=turned), find)
        assert [one["category_id"] for one in result.detections] == [5, 9, 2]

    def test_invalid_ones_are_left_out(self, monkeypatch):
        call = Detect.__call__

        def first_alone(self, *arguments):
            boxes, scores, labels, valid = call(self, *arguments)
            valid[:, 1] = False
            return boxes, scores, labels, valid

        monkeypatch.setattr(Detect, "__call__", first_alone)
        result, _ = run(dataset([plain(*shape, RED) for shape in SHAPES], [[]] * 5))
        assert [one["score"] for one in result.detections] == [0.75] * 5

    def test_they_are_in_the_order_of_image_ids_without_fillers(self):
        """Three images of one shape make two batches of two, the last of which has an empty slot."""
        result, batches = run(dataset([plain(64, 64, RED)] * 3, [[]] * 3))
        assert [one["image_id"] for one in result.detections] == [10, 10, 11, 11, 12, 12]
        assert [len(images) for images, _ in batches] == [2, 2]

    def test_an_unreadable_image_has_none(self, caplog):
        pictures = dataset([plain(64, 64, RED)] * 2, [[]] * 2, encoded=[b"broken", png(plain(64, 64, RED))])
        result, _ = run(pictures)
        assert {one["image_id"] for one in result.detections} == {11}
        assert "0.png is not an image that can be decoded; it has no detections" in caplog.text


def test_the_network_sees_rgb():
    """Each image is resized, and in its slot at the top left."""
    colours = [RED, GREEN, BLUE, (200, 120, 40)]
    _, batches = run(dataset([plain(100, 80, colour) for colour in colours], [[]] * 4))
    seen = [(image, size) for images, sizes in batches for image, size in zip(images, sizes)]
    assert len(seen) == 4
    for (image, size), colour in zip(seen, colours):
        assert size.tolist() == [64, 51]
        assert image[0, 0].tolist() == image[63, 50].tolist() == list(colour)
        assert not image[:, 51:].any()


class TestAveragePrecision:
    """Each image is one large cup, with a hat in its lower right quarter; there are no pens."""

    def pictures(self, classes=CLASSES):
        boxes = [[(0, 0, w, h), (w / 2, h / 2, w, h)] for h, w in SHAPES]
        return dataset([plain(*s, RED) for s in SHAPES], boxes, labels=[[0, 2]] * len(SHAPES), classes=classes)

    def test_everything_found(self):
        result, _ = run(self.pictures())
        assert result.metrics["AP"] == result.metrics["AP50"] == result.metrics["AR100"] == pytest.approx(1)
        assert result.per_class == {
            "cup": {"AP": pytest.approx(1), "AP50": pytest.approx(1)},
            "pen": {"AP": -1, "AP50": -1},
            "hat": {"AP": pytest.approx(1), "AP50": pytest.approx(1)},
        }

    def test_of_each_class(self):
        """Cups are detected where they are, hats in the wrong quarter."""
        result, _ = run(self.pictures(), lambda h, w: ([(0, 0, w, h), (0, 0, w / 2, h / 2)], (0.75, 0.5), (0, 2)))
        assert result.per_class["cup"]["AP"] == pytest.approx(1)
        assert result.per_class["hat"]["AP"] == 0
        assert result.metrics["AP"] == pytest.approx(0.5)

    def test_classes_of_the_same_name_are_told_apart(self, caplog):
        result, _ = run(self.pictures(Classes(("cup", "pen", "cup"), (2, 5, 9))))
        assert list(result.per_class) == ["cup (2)", "pen", "cup (9)"]


def test_the_table_lists_average_precision_by_class(caplog):
    with caplog.at_level("INFO", "hpr_jax"):
        log_table(EvaluationResult({}, {"cup": {"AP": 0.25, "AP50": 0.5}, "hat": {"AP": 0.125, "AP50": 0.75}}, []))
    assert [message.split() for message in caplog.messages] == [
        ["class", "AP", "AP50"],
        ["cup", "0.2500", "0.5000"],
        ["hat", "0.1250", "0.7500"],
    ]


def test_data_of_other_classes_is_refused(tmp_path):
    """Labels of the checkpoint are of its own classes, whatever the data has."""
    stored = tiny.ROOT / "tests/reference_values/unfinished_run"
    data = shutil.copytree(stored / "data", tmp_path / "data")
    path = data / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace('"pen"', '"fork"'))
    with pytest.raises(UserError, match="fork"):
        evaluate(stored / "run", tmp_path / "out", [("data.directory", str(data))])
    assert not (tmp_path / "out").exists()


def test_from_python_settings_reach_the_evaluation(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("hpr_jax.evaluation.python.run", lambda *arguments: seen.append(arguments) or "result")
    assert (
        hpr_jax.evaluate("runs/demo", data=tmp_path, overrides={"evaluate.side": 64, "evaluate.evaluator": "auto"})
        == "result"
    )
    hpr_jax.evaluate("runs/demo", output="~/here")
    settings = [("evaluate.side", "64"), ("evaluate.evaluator", "auto"), ("data.directory", str(tmp_path))]
    assert seen == [("runs/demo", None, settings), ("runs/demo", Path.home() / "here", [])]
