"""Data sets of shapes in COCO's own layout, and the same in other layouts and formats."""

import json
import shutil
from pathlib import Path
from typing import Any

import folders

from hpr_jax.data.build import load_dataset
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.shapes import make_shapes

SPLITS = ("train", "val")


def shapes(directory: Path, *, whole: bool = False) -> Path:
    """Draws a data set of 6 and 3 images; `whole`: with boxes in whole pixels."""
    make_shapes(directory, 6, 3, 64, 0)
    if whole:
        for split in SPLITS:
            folders.edit(directory, _round, split)
    return directory


def _round(content: dict[str, Any]) -> None:
    for one in content["annotations"]:
        one["bbox"] = [round(value) for value in one["bbox"]]
        del one["segmentation"], one["area"]


def load(directory: Path, *, masks: bool = False, **settings: Any) -> tuple[Dataset, Dataset]:
    """Both splits, as training reads them."""
    data = folders.settings(directory, **settings)
    train = load_dataset(data, "train", masks=masks)
    return train, load_dataset(data, "val", train.classes, masks=masks)


def content(directory: Path, split: str) -> dict[str, Any]:
    """The annotation file of a split in COCO's own layout."""
    return json.loads((directory / f"annotations/instances_{split}2017.json").read_text())


def of_image(content: dict[str, Any], image: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotations of an image."""
    return [one for one in content["annotations"] if one["image_id"] == image["id"]]


def to_roboflow_coco(source: Path, target: Path) -> Path:
    """Roboflow's export: annotations beside the images, in `train/` and `valid/`."""
    for split, folder in (("train", "train"), ("val", "valid")):
        shutil.copytree(source / f"{split}2017", target / folder)
        shutil.copy(source / f"annotations/instances_{split}2017.json", target / folder / "_annotations.coco.json")
    return target


def to_yolo(source: Path, target: Path, *, polygons: bool = False) -> Path:
    """Ultralytics' layout, with boxes or polygons in ten digits."""
    categories = [category["id"] for category in content(source, "train")["categories"]]
    for split in SPLITS:
        shutil.copytree(source / f"{split}2017", target / "images" / split)
        (target / "labels" / split).mkdir(parents=True)
        annotations = content(source, split)
        for image in annotations["images"]:
            lines = []
            for one in of_image(annotations, image):
                width, height = image["width"], image["height"]
                x, y, w, h = one["bbox"]
                numbers = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
                if polygons:
                    numbers = [v / (height if place % 2 else width) for place, v in enumerate(one["segmentation"][0])]
                label = categories.index(one["category_id"])
                lines.append(f"{label} {' '.join(f'{number:.10f}' for number in numbers)}\n")
            path = target / "labels" / split / Path(image["file_name"]).with_suffix(".txt")
            path.write_text("".join(lines))
    names = [category["name"] for category in content(source, "train")["categories"]]
    (target / "data.yaml").write_text(f"train: images/train\nval: images/val\nnc: {len(names)}\nnames: {names}\n")
    return target


def to_voc(source: Path, target: Path, *, roboflow: bool = False) -> Path:
    """Pascal VOC's own layout, or Roboflow's with the XML files beside the images."""
    lists = target / "ImageSets/Main"
    for split in SPLITS:
        annotations = content(source, split)
        names = {category["id"]: category["name"] for category in annotations["categories"]}
        stems = []
        for image in annotations["images"]:
            # Names are the same in both splits of COCO's layout, and VOC has one folder.
            stem = Path(image["file_name"]).stem if roboflow else f"{split}_{Path(image['file_name']).stem}"
            stems.append(stem)
            folder = {"train": "train", "val": "valid"}[split]
            picture = target / (folder if roboflow else "JPEGImages") / f"{stem}.jpg"
            objects = [(names[one["category_id"]], one["bbox"], False) for one in of_image(annotations, image)]
            write_voc(target / (folder if roboflow else "Annotations") / f"{stem}.xml", picture.name, image, objects)
            picture.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / f"{split}2017" / image["file_name"], picture)
        if not roboflow:
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    return target


def write_voc(path: Path, file_name: str, image: dict[str, Any], objects: list[tuple[str, list[float], bool]]) -> None:
    """Writes an annotation file of objects (class, COCO's box, difficult)."""
    lines = ["<annotation>", f"<filename>{file_name}</filename>"]
    lines.append(f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>")
    for name, (x, y, w, h), difficult in objects:
        corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        lines.append(
            f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>{corners}</bndbox></object>"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</annotation>"]))
