"""The format of COCO (https://cocodataset.org/#format-data): folders of images, and annotations in a JSON file.

Other formats turn their annotations into entries of this one, and have `parse_entries` check them.
"""

import contextlib
import functools
import gc
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpr_jax.data.dataset import Classes, Dataset, ImageAnnotations, Problem, Records
from hpr_jax.data.images import EncodedImages, ImageFolder
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
# The classes of COCO 2017. Ten of the ids up to 90 are unused.
COCO_CLASSES = Classes(
    tuple(_COCO_NAMES.split(", ")),
    tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})),
)

# The entry of an image in an annotation file, and those of its annotations.
Entry = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]


def is_coco(directory: Path, images: str, annotations: str) -> bool:
    """Whether the directory has the annotation file of a split."""
    return (directory / annotations).exists()


def load_coco(
    directory: Path, images: str, annotations: str, classes: Classes | None = None, *, masks: bool = False
) -> Dataset:
    """Reads the annotations of one split.

    Args:
      images: folder of the image files, relative to `directory`.
      annotations: JSON file, relative to `directory`.
      classes: classes of the training split or a checkpoint, which the file's must be. None: the file's are taken.
      masks: whether to read the segmentations, too.

    Raises:
      UserError: a folder or file is missing, the JSON is broken or incomplete, a reference leads nowhere, or the file's
        categories are not `classes`.
    """
    directory = Path(directory)
    path = directory / annotations
    if not directory.is_dir():
        raise UserError(f"The data directory {directory} does not exist; set --config.data.directory.")
    if not (directory / images).is_dir():
        raise UserError(f"The image folder {directory / images} does not exist; set config.data.*_images.")
    if not path.is_file():
        raise UserError(f"The annotation file {path} does not exist; set config.data.*_annotations.")
    data = path.read_bytes()
    fingerprint = hashlib.sha256(data).hexdigest()
    with without_garbage_collection(), named_errors(f"The annotation file {path}"):
        content = _parse_json(path, data)
        # COCO's has half a gigabyte, as much as everything that is kept of it.
        del data
        entries = group_annotations(content, path)
        names = [str(image["file_name"]) for image in content["images"]]
        parsed = parse_entries(
            entries, content["categories"], str(path), ImageFolder(directory / images, names), classes, masks=masks
        )
    return Dataset(str(path), fingerprint, functools.partial(read_json, path), *parsed)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turns garbage collection off where millions of objects are made that all stay: it would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Turns errors that come from entries which are not in COCO format into a `UserError` about `what`."""
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
      UserError: the file is not JSON.
    """
    with without_garbage_collection():
        return _parse_json(path, path.read_bytes())


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"The annotation file {path} is not JSON: {error}.") from error


def group_annotations(content: Mapping[str, Any], path: Path) -> list[Entry]:
    """The images of an annotation file, each with its annotations.

    Raises:
      UserError: an image id is listed twice, or an annotation belongs to no image.
    """
    images: dict[int, Mapping[str, Any]] = {}
    annotations: dict[int, list[Mapping[str, Any]]] = {}
    for image in content["images"]:
        if image["id"] in images:
            raise UserError(f"The annotation file {path} lists image id {image['id']} twice.")
        images[image["id"]], annotations[image["id"]] = image, []
    for annotation in content["annotations"]:
        image_id = annotation["image_id"]
        if image_id not in images:
            raise UserError(f"Annotation {annotation.get('id')} of {path} belongs to image {image_id}, which is not listed.")
        annotations[image_id].append(annotation)
    return list(zip(images.values(), annotations.values()))


class Parsed(NamedTuple):
    """The fields of a `Dataset` that follow from its annotations."""

    classes: Classes
    records: Records
    dropped_boxes: tuple[Problem, ...]
    dropped_masks: tuple[Problem, ...]


def parse_entries(
    entries: Iterable[Entry],
    categories: Sequence[Mapping[str, Any]],
    name: str,
    images: EncodedImages,
    classes: Classes | None,
    *,
    masks: bool,
) -> Parsed:
    """Checks annotations in COCO form.

    Args:
      entries: the images and their annotations.
      categories: entries of the categories.
      name: the name that messages give the split.
      images: the images of the entries, in their order; reading the entries may be what fills it.
      classes: classes that the categories must be. None: any.
      masks: whether to read the segmentations, too.

    Raises:
      UserError: there are no categories, a category is listed twice, the categories are not `classes`, or an annotation's
        category is not listed.
    """
    classes = _parse_categories(categories, name, classes)
    label_of = {category: label for label, category in enumerate(classes.category_ids)}
    dropped_boxes: list[Problem] = []
    dropped_masks: list[Problem] = []
    parsed = (
        _parse_image(image, annotations, name, label_of, masks, dropped_boxes, dropped_masks)
        for image, annotations in entries
    )
    records = Records.pack(parsed, images, with_masks=masks)
    return Parsed(classes, records, tuple(dropped_boxes), tuple(dropped_masks))


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
        # A model that was converted from elsewhere may have them in another order, which its labels refer to.
        return classes
    if classes is not None:
        raise UserError(
            f"The categories of {name} ({_list_some(own)}) are not those that the model knows ({_list_some(classes)})."
        )
    return own


def _parse_image(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    name: str,
    label_of: Mapping[int, int],
    with_masks: bool,
    dropped_boxes: list[Problem],
    dropped_masks: list[Problem],
) -> ImageAnnotations:
    """What is annotated of an image; what is wrong is appended to `dropped_boxes` and `dropped_masks`."""
    image_id, width, height = image["id"], float(image["width"]), float(image["height"])
    if width < 1 or height < 1:
        raise UserError(f"Image {image_id} of {name} is {width:g}x{height:g} pixels large.")
    boxes, labels, masks = [], [], []
    crowds: list[Mask] = []
    for annotation in annotations:
        subject, category = f"annotation {annotation.get('id')} of image {image_id}:", annotation["category_id"]
        if category not in label_of:
            raise UserError(f"Annotation {annotation.get('id')} of {name} has category {category}, which is not listed.")
        mask = None
        if with_masks:
            mask, reason = _read_mask(annotation, width, height)
            if reason:
                dropped_masks.append(Problem(f"{subject} its segmentation", reason))
        if annotation.get("iscrowd", 0):
            if mask is not None:
                crowds.append(mask)
            continue
        box, reason = clip_box(annotation["bbox"], width, height)
        if reason:
            dropped_boxes.append(Problem(f"{subject} box {annotation['bbox']}", reason))
            continue
        boxes.append(box)
        labels.append(label_of[category])
        masks.append(mask)
    return ImageAnnotations(
        image_id=image_id,
        height=int(height),
        width=int(width),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int32),
        masks=tuple(masks) if with_masks else (),
        crowds=tuple(crowds),
    )


def _read_mask(annotation: Mapping[str, Any], width: float, height: float) -> tuple[Mask | None, str]:
    """The mask of an annotation, None if it has none or an impossible one, and the reason why it is impossible, or ""."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None, ""
    try:
        return parse_segmentation(segmentation, int(height), int(width)), ""
    except MalformedMaskError as error:
        return None, str(error)


def clip_box(bbox: Sequence[float], width: float, height: float) -> tuple[tuple[float, ...], str]:
    """Turns COCO's (left, top, width, height) into xyxy, clipped to an image of this size.

    Returns:
      The box and "", or () and the reason why the box is impossible.
    """
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


def _list_some(classes: Classes) -> str:
    """The first few classes for a message."""
    some = ", ".join(f"{number} {name}" for number, name in zip(classes.category_ids[:8], classes.names))
    return some + (f", and {len(classes.names) - 8} more" if len(classes.names) > 8 else "")
