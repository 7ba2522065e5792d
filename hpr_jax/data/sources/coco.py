"""Annotations in COCO form (https://cocodataset.org/#format-data), checked; data sets that are a folder of them."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpr_jax.data.dataset import Classes, Dataset, Problem, Record, Records
from hpr_jax.data.images import EncodedImage, ImageFile
from hpr_jax.data.masks import MalformedMaskError, Mask, parse_segmentation
from hpr_jax.errors import UserError

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

# An image's entry, and those of its annotations.
Entry = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class ImageFolder(Sequence[EncodedImage]):
    """Image files below a folder, by their names."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageFile:
        return ImageFile(self.folder / self.names[index])


def load_coco(
    directory: Path, images: str, annotations: str, classes: Classes | None = None, *, masks: bool = False
) -> Dataset:
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
    data = path.read_bytes()
    fingerprint = hashlib.sha256(data).hexdigest()
    with no_collection(), named_errors(f"The annotation file {path}"):
        content = _read_json(path, data)
        # Half a gigabyte for COCO, as large as all that is kept of it.
        del data
        entries = group_annotations(content, path)
        names = [str(image["file_name"]) for image in content["images"]]
        folder = ImageFolder(Path(directory) / images, names)
        parsed = parse_entries(entries, content["categories"], str(path), folder, classes, masks=masks)
    return Dataset(str(path), fingerprint, functools.partial(read_json, path), *parsed)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without garbage collection: where millions of objects are made and all of them stay, it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Turns what goes wrong in entries that are not as they should be into a sentence about `what`."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        explained = f"an entry has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{what} is not in COCO format: {explained}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The content of an annotation file.

    Raises:
      UserError: it is not JSON.
    """
    with no_collection():
        return _read_json(path, path.read_bytes())


def _read_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"The annotation file {path} is not JSON: {error}.") from error


def group_annotations(content: Mapping[str, Any], path: Path) -> list[Entry]:
    """The images of an annotation file, each with its annotations.

    Raises:
      UserError: an image id is listed twice, or an annotation belongs to no image.
    """
    entries: dict[int, Entry] = {}
    for image in content["images"]:
        if image["id"] in entries:
            raise UserError(f"The annotation file {path} lists image id {image['id']} twice.")
        entries[image["id"]] = image, []
    for annotation in content["annotations"]:
        image = annotation["image_id"]
        if image not in entries:
            raise UserError(f"Annotation {annotation.get('id')} of {path} belongs to image {image}, which is not listed.")
        entries[image][1].append(annotation)
    return list(entries.values())


class Parsed(NamedTuple):
    """What a `Dataset` holds of its annotations."""

    classes: Classes
    records: Records
    dropped: tuple[Problem, ...]
    unmasked: tuple[Problem, ...]


def parse_entries(
    entries: Iterable[Entry],
    categories: Sequence[Mapping[str, Any]],
    name: str,
    images: Sequence[EncodedImage],
    classes: Classes | None,
    *,
    masks: bool,
) -> Parsed:
    """Checks annotations in COCO form.

    Args:
      name: of the split, for messages.
      images: the images of the entries, in their order; may be filled while the entries are read.
      classes: those that the categories must be, or None.
      masks: whether to read the segmentations, too.

    Raises:
      UserError: categories are missing, double or not `classes`, or an annotation's category is not listed.
    """
    classes = _parse_categories(categories, name, classes)
    label_of = {category: label for label, category in enumerate(classes.category_ids)}
    dropped: list[Problem] = []
    unmasked: list[Problem] = []

    def records() -> Iterator[Record]:
        for image, annotations in entries:
            yield _parse_image(image, annotations, name, label_of, masks, dropped, unmasked)

    packed = Records.pack(records(), images, with_masks=masks)
    return Parsed(classes, packed, tuple(dropped), tuple(unmasked))


def _parse_categories(categories: Sequence[Mapping[str, Any]], name: str, classes: Classes | None) -> Classes:
    categories = sorted(categories, key=lambda category: category["id"])
    own = Classes(
        names=tuple(str(category["name"]) for category in categories),
        category_ids=tuple(int(category["id"]) for category in categories),
    )
    if not own.names:
        raise UserError(f"{name} lists no categories.")
    if len(set(own.category_ids)) != len(own.category_ids):
        raise UserError(f"{name} lists a category id twice.")
    if classes is not None and classes.as_set() == own.as_set():
        # Models converted from elsewhere may number them in another order.
        return classes
    if classes is not None:
        raise UserError(f"The categories of {name} ({_show(own)}) are not those that the model knows ({_show(classes)}).")
    return own


def _parse_image(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    name: str,
    label_of: Mapping[int, int],
    with_masks: bool,
    dropped: list[Problem],
    unmasked: list[Problem],
) -> Record:
    """The record of an image, without the image; appends to `dropped` and `unmasked`."""
    image_id, width, height = image["id"], float(image["width"]), float(image["height"])
    if width < 1 or height < 1:
        raise UserError(f"Image {image_id} of {name} is {width:g}x{height:g} pixels large.")
    boxes, labels, masks, crowds = [], [], [], []
    for annotation in annotations:
        subject, category = f"annotation {annotation.get('id')} of image {image_id}:", annotation["category_id"]
        if category not in label_of:
            raise UserError(f"Annotation {annotation.get('id')} of {name} has category {category}, which is not listed.")
        mask = None
        if with_masks:
            mask, reason = _read_mask(annotation, width, height)
            if reason:
                unmasked.append(Problem(f"{subject} its segmentation", reason))
        if annotation.get("iscrowd", 0):
            crowds += [mask] * (mask is not None)
            continue
        box, reason = clip_box(annotation["bbox"], width, height)
        if reason:
            dropped.append(Problem(f"{subject} box {annotation['bbox']}", reason))
            continue
        boxes.append(box)
        labels.append(label_of[category])
        masks.append(mask)
    return Record(
        image_id=image_id,
        image=None,
        height=int(height),
        width=int(width),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int32),
        masks=tuple(masks) if with_masks else (),
        crowds=tuple(crowds),
    )


def _read_mask(annotation: Mapping[str, Any], width: float, height: float) -> tuple[Mask | None, str]:
    """An annotation's mask, None without one, and what is wrong with it."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None, ""
    try:
        return parse_segmentation(segmentation, int(height), int(width)), ""
    except MalformedMaskError as error:
        return None, str(error)


def clip_box(bbox: Sequence[float], width: float, height: float) -> tuple[tuple, str]:
    """COCO's (left, top, width, height) -> xyxy inside the image, or why the box cannot be."""
    if len(bbox) != 4:
        return (), "does not have four numbers"
    left, top, w, h = map(float, bbox)
    if not all(map(math.isfinite, (left, top, w, h))):
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
