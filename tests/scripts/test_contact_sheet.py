"""The contact sheet: predictions beside the ground truth."""

import sys
from types import SimpleNamespace

import contact_sheet
import cv2
import numpy as np
import tiny

from hpr_jax.data.build import load_dataset


def test_boxes_are_those_of_the_resized_images(tmp_path, monkeypatch, capsys):
    config = tiny.config(tiny.write_coco(tmp_path / "data"))
    dataset = load_dataset(config.data, "val")
    drawn = []

    class Detector:
        classes = dataset.classes

        def __init__(self):
            self.config = config

        def __call__(self, image, threshold):
            assert threshold == 0.4
            return SimpleNamespace(boxes=np.array([[3, 6, 30, 24.0]]), labels=[1], scores=[0.5], names=["pen"])

    def draw(image, boxes, labels, captions):
        drawn.append((image.shape, boxes, list(labels), captions))
        return image

    monkeypatch.setattr(contact_sheet.hpr_jax, "load", lambda workdir: Detector())
    monkeypatch.setattr(contact_sheet, "draw", draw)
    monkeypatch.setattr(sys, "argv", ["contact_sheet", str(tmp_path), "--threshold", "0.4", "--images", "2"])
    contact_sheet.main()
    assert capsys.readouterr().out == f"{tmp_path}/contact_sheet.jpg\n"
    scale = contact_sheet.HEIGHT / 48
    assert len(drawn) == 4
    for number, record in enumerate(list(dataset.records)[:2]):
        predicted, truth = drawn[2 * number : 2 * number + 2]
        assert predicted[0] == truth[0] == (320, 400, 3)
        np.testing.assert_allclose(predicted[1], np.array([[3, 6, 30, 24.0]]) * scale)
        assert predicted[3] == ["pen 0.50"]
        np.testing.assert_allclose(truth[1], record.boxes * scale)
        assert truth[3] == [dataset.classes.names[label] for label in record.labels]
    sheet = cv2.imread(str(tmp_path / "contact_sheet.jpg"))
    assert sheet is not None
    assert sheet.shape[0] >= 320
