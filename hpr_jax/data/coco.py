"""COCO-format annotations (https://cocodataset.org/#format-data), checked."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpr_jax.data.masks import MalformedMaskError, Mask, parse_segmentation
from hpr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """One image and its objects.

    Attributes:
      image_id: as in the annotations.
      path: of the image file.
      height, width: in pixels, as annotated.
      boxes: float32 xyxy `[n, 4]` in pixels, clipped to the image; crowds left out.
      labels: int32 `[n]`, indices into the data set's classes.
      masks: of the objects, None for those without; () where masks were not read.
      crowds: masks of the crowds, where masks were read.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    masks: tuple[Mask | None, ...] = ()
    crowds: tuple[Mask, ...] = ()


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their labels; category ids may have gaps."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def as_set(self) -> set[tuple[int, str]]:
        """Category ids and names, whatever their order."""
        return set(zip(self.category_ids, self.names))


_COCO_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking "
    "meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, "
    "suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis "
    "racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, "
    "pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell "
    "phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
# The classes of COCO 2017; ten ids of the first draft went unused.
COCO_CLASSES = Classes(
    tuple(_COCO_NAMES.split(", ")),
    tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})),
)


@dataclasses.dataclass(frozen=True)
class CocoDataset:
    """A split of a COCO-format data set.

    Attributes:
      annotations: path of the JSON file.
      fingerprint: SHA-256 of the annotations.
      dropped: a sentence for each box that cannot be.
      unmasked: a sentence for each mask that cannot be.
    """

    annotations: Path
    classes: Classes
    records: tuple[Record, ...]
    dropped: tuple[str, ...]
    unmasked: tuple[str, ...] = ()
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sizes(self) -> np.ndarray:
        """(height, width) of every image: int `[M, 2]`."""
        return np.array([(record.height, record.width) for record in self.records], np.int64).reshape(-1, 2)

    def count_masks(self) -> tuple[int, int]:
        """How many objects have a mask, and how many there are."""
        masks = [mask for record in self.records for mask in record.masks]
        return sum(mask is not None for mask in masks), sum(len(record.boxes) for record in self.records)

    def subset(self, *, keep_empty: bool, min_side: int) -> "CocoDataset":
        """Without images whose shorter side is below `min_side`, and without those that have no object unless kept."""
        records = [
            record
            for record in self.records
            if min(record.height, record.width) >= min_side and (keep_empty or len(record.boxes))
        ]
        return dataclasses.replace(self, records=tuple(records))


def load_coco(
    directory: Path, images: str, annotations: str, classes: Classes | None = None, *, masks: bool = False
) -> CocoDataset:
    """Reads the annotations of one split.

    Args:
      images: folder of the image files, relative to `directory`.
      annotations: JSON file, relative to `directory`.
      classes: those of the training split or a checkpoint; the file's own when None.
      masks: whether to read the segmentations, too.

    Raises:
      UserError: a folder or file is missing, the JSON is broken or incomplete, a reference leads nowhere, or the file's
        categories are not `classes`.
    """
    path = Path(directory) / annotations
    if not Path(directory).is_dir():
        raise UserError(f"The data directory {directory} does not exist; set --config.data.directory.")
    if not (Path(directory) / images).is_dir():
        raise UserError(f"The image folder {Path(directory) / images} does not exist; set config.data.*_images.")
    if not path.is_file():
        raise UserError(f"The annotation file {path} does not exist; set config.data.*_annotations.")
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except ValueError as error:
        raise UserError(f"The annotation file {path} is not JSON: {error}.") from error
    try:
        dataset = _parse(content, path, Path(directory) / images, classes, masks)
        return dataclasses.replace(dataset, fingerprint=hashlib.sha256(raw).hexdigest())
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"The annotation file {path} is not in COCO format: {_explain(error)}.") from error


def _explain(error: Exception) -> str:
    return f"an entry has no {error}" if isinstance(error, KeyError) else str(error)


def _parse(content: dict, path: Path, folder: Path, classes: Classes | None, with_masks: bool) -> CocoDataset:
    categories = sorted(content["categories"], key=lambda category: category["id"])
    own = Classes(
        names=tuple(str(category["name"]) for category in categories),
        category_ids=tuple(int(category["id"]) for category in categories),
    )
    if not own.names:
        raise UserError(f"The annotation file {path} lists no categories.")
    if len(set(own.category_ids)) != len(own.category_ids):
        raise UserError(f"The annotation file {path} lists a category id twice.")
    if classes is not None and classes.as_set() == own.as_set():
        # Models converted from elsewhere may number them in another order.
        own = classes
    elif classes is not None:
        raise UserError(f"The categories of {path} ({_show(own)}) are not those that the model knows ({_show(classes)}).")
    label_of = {category: label for label, category in enumerate(own.category_ids)}

    objects: dict[int, list] = {}
    crowds: dict[int, list[Mask]] = {}
    sizes = {}
    for image in content["images"]:
        if image["id"] in sizes:
            raise UserError(f"The annotation file {path} lists image id {image['id']} twice.")
        sizes[image["id"]] = (float(image["width"]), float(image["height"]))
        objects[image["id"]], crowds[image["id"]] = [], []
    dropped, unmasked = [], []
    for annotation in content["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in sizes:
            raise UserError(f"Annotation {annotation.get('id')} of {path} belongs to image {image}, which is not listed.")
        if category not in label_of:
            raise UserError(f"Annotation {annotation.get('id')} of {path} has category {category}, which is not listed.")
        mask, crowd = None, annotation.get("iscrowd", 0)
        if with_masks:
            mask, reason = _read_mask(annotation, *sizes[image])
            if reason:
                unmasked.append(f"annotation {annotation.get('id')} of image {image}: its segmentation {reason}")
        if crowd:
            crowds[image] += [mask] * (mask is not None)
            continue
        box, reason = _clip(annotation["bbox"], *sizes[image])
        if reason:
            dropped.append(f"annotation {annotation.get('id')} of image {image}: box {annotation['bbox']} {reason}")
        else:
            objects[image].append((box, label_of[category], mask))

    records = []
    for image in content["images"]:
        found = objects[image["id"]]
        records.append(
            Record(
                image_id=image["id"],
                path=folder / image["file_name"],
                height=int(image["height"]),
                width=int(image["width"]),
                boxes=np.array([box for box, _, _ in found], np.float32).reshape(-1, 4),
                labels=np.array([label for _, label, _ in found], np.int32),
                masks=tuple(mask for _, _, mask in found) if with_masks else (),
                crowds=tuple(crowds[image["id"]]),
            )
        )
    return CocoDataset(path, own, tuple(records), tuple(dropped), tuple(unmasked))


def _read_mask(annotation: dict, width: float, height: float) -> tuple[Mask | None, str]:
    """An annotation's mask, None without one, and what is wrong with it."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None, ""
    try:
        return parse_segmentation(segmentation, int(height), int(width)), ""
    except MalformedMaskError as error:
        return None, str(error)


def _clip(bbox: Sequence[float], width: float, height: float) -> tuple[tuple, str]:
    """COCO's (left, top, width, height) -> xyxy inside the image, or why the box cannot be."""
    if len(bbox) != 4:
        return (), "does not have four numbers"
    left, top, w, h = map(float, bbox)
    if not np.all(np.isfinite((left, top, w, h))):
        return (), "is not finite"
    if w < 1 or h < 1:
        return (), "is less than a pixel wide or high"
    box = (max(left, 0.0), max(top, 0.0), min(left + w, width), min(top + h, height))
    if box[2] <= box[0] or box[3] <= box[1]:
        return (), "lies outside the image"
    return box, ""


def _show(classes: Classes) -> str:
    shown = ", ".join(f"{number} {name}" for number, name in zip(classes.category_ids[:8], classes.names))
    return shown + (f", and {len(classes.names) - 8} more" if len(classes.names) > 8 else "")
