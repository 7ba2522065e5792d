"""A COCO folder with some of everything, for tests of what reads it and of what it is converted to."""

import json

import numpy as np
import tiny


def settings(directory, **others):
    """The section `data` of a config."""
    data = tiny.config(directory).data
    data.update(others)
    return data


def edit(directory, change, split="train"):
    """Has `change` change the content of the annotation file of a split."""
    path = directory / f"annotations/instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_folder(directory):
    """A tiny COCO folder with a turned image, a box that leaves its image, a mask of run lengths and one of two polygons."""
    tiny.write_coco(directory)
    turned = np.random.default_rng(0).integers(0, 255, (60, 48, 3)).astype(np.uint8)
    tiny.write_turned(directory / "train2017/2.jpg", turned, 6)
    path = directory / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    first, second, third, *_ = content["annotations"]
    first.update(bbox=[-5.3, 0.1, 40, 20.7], area=123.4)
    second["segmentation"] = {"size": [48, 60], "counts": [500, 30, 48 * 60 - 530]}
    third["segmentation"] += [[1.1, 2.2, 3.3, 2.2, 3.3, 9.9]]
    path.write_text(json.dumps(content))
    return directory
