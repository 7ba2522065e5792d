"""The format of COCO (https://cocodataset.org/#format-data): folders of images, and annotations in a JSON file.

Other formats turn their annotations into entries of this one, and have `parse_entries` check them.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpr_jax.data.dataset import Classes, Dataset, GroundTruth, Id, ImageAnnotations, Problem, Records, id_order
from hpr_jax.data.images import EncodedImages, ImageFolder
from hpr_jax.data.masks import MalformedMaskError, Mask, mask_box, parse_segmentation
from hpr_jax.data.sources.coco_fields import (
    FieldError,
    other_form,
    read_area,
    read_box,
    read_crowd,
    read_file_name,
    read_id,
    read_side,
    read_text,
)
from hpr_jax.errors import UserError, shown

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
# A box as COCO writes it: left, top, width, height.
XYWH = tuple[float, float, float, float]
# The lists of objects in an annotation file.
LISTS = ("images", "annotations", "categories")
# At most so many of the classes that differ are named.
NAMED = 8


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
    with without_garbage_collection():
        return load_content(read_content(path, directory / images), directory, classes, masks=masks)


@dataclasses.dataclass(frozen=True)
class Content:
    """A split in COCO form, as it is before the checks of `load_content`.

    Attributes:
      name: the name that messages give the split.
      fingerprint: that of the `Dataset`.
      folder: folder that file names are relative to.
      categories: entries of the categories.
      entries: entries of the images, each with those of its annotations.
    """

    name: str
    fingerprint: str
    folder: Path
    categories: Sequence[Mapping[str, Any]]
    entries: Sequence[Entry]

    @classmethod
    def make(cls, name: str, folder: Path, categories: Sequence[Mapping[str, Any]], entries: Sequence[Entry]) -> "Content":
        """A split without an annotation file of its own. Its fingerprint is that of the file that `json.dumps` makes."""
        lists = {
            "images": [image for image, _ in entries],
            "annotations": [annotation for _, annotations in entries for annotation in annotations],
            "categories": categories,
        }
        return cls(name, hashlib.sha256(json.dumps(lists).encode()).hexdigest(), folder, categories, entries)


def read_content(path: Path, folder: Path) -> Content:
    """Reads an annotation file whose images are in `folder`.

    Raises:
      UserError: the JSON is broken or incomplete, or a reference leads nowhere.
    """
    data = path.read_bytes()
    fingerprint = hashlib.sha256(data).hexdigest()
    content = _parse_json(path, data)
    # COCO's has half a gigabyte, as much as everything that is kept of it.
    del data
    return Content(str(path), fingerprint, folder, content["categories"], group_annotations(content, path))


def load_content(
    content: Content, root: Path, classes: Classes | None = None, *, masks: bool = False, origin: str = "COCO"
) -> Dataset:
    """Checks a split in COCO form.

    Args:
      root: folder of the data, which no file name leads out of.
      classes, masks: as in `load_coco`.
      origin: that of the `Dataset`.

    Raises:
      UserError: as `file_names` and `parse_entries` do.
    """
    with without_garbage_collection():
        names = file_names(content.entries, content.name, content.folder, root)
        images = ImageFolder(content.folder, names)
        parsed = parse_entries(content.entries, content.categories, content.name, images, classes, masks=masks)
    return Dataset(content.name, content.fingerprint, *parsed, origin=origin)


def ids_of_names(names: Sequence[str], classes: Classes | None, otherwise: Sequence[int]) -> list[Id]:
    """Category ids for a format that has none: those of the same names in `classes`, or else those given."""
    if classes is not None and len(set(names)) == len(names) and sorted(names) == sorted(classes.names):
        return [dict(zip(classes.names, classes.category_ids))[name] for name in names]
    return list(otherwise)


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


def read_json(path: Path, lists: Sequence[str] = LISTS) -> dict[str, Any]:
    """The content of an annotation file: an object that has these lists of objects.

    Raises:
      UserError: the file is not JSON, or has no such lists.
    """
    with without_garbage_collection():
        return _parse_json(path, path.read_bytes(), lists)


def _parse_json(path: Path, data: bytes, lists: Sequence[str] = LISTS) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except RecursionError:
        raise UserError(f"The annotation file {path} is not in COCO format: its lists are nested too deeply.") from None
    except ValueError as error:
        raise UserError(f"The annotation file {path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"The annotation file {path} is not in COCO format: it holds no object with images and annotations.")
    for key in lists:
        entries = content.get(key)
        if not isinstance(entries, list):
            what = f"no list of {key}" if key not in content else f"{shown(entries)} in the place of the list of {key}"
            raise UserError(f"The annotation file {path} is not in COCO format: it has {what}.")
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UserError(
                    f"The annotation file {path} is not in COCO format: entry {place} of its {key} is {shown(entry)}."
                )
    return content


def group_annotations(content: Mapping[str, Any], path: Path) -> list[Entry]:
    """The images of an annotation file, each with its annotations.

    Raises:
      UserError: an image has no id or that of another one, or an annotation belongs to no image.
    """
    images: dict[Id, Mapping[str, Any]] = {}
    annotations: dict[Id, list[Mapping[str, Any]]] = {}
    for place, image in enumerate(content["images"]):
        try:
            image_id = read_id(image, "id")
        except FieldError as error:
            raise UserError(f"Entry {place} of the images of {path} {error}.") from error
        if image_id in images:
            raise UserError(f"The annotation file {path} lists image id {shown(image_id)} twice.")
        images[image_id], annotations[image_id] = image, []
    for annotation in content["annotations"]:
        try:
            image_id = read_id(annotation, "image_id")
        except FieldError as error:
            raise UserError(f"Annotation {shown(annotation.get('id'))} of {path} {error}.") from error
        if image_id not in images:
            raise UserError(
                f"Annotation {shown(annotation.get('id'))} of {path} belongs to image {shown(image_id)}, which is not "
                f"listed{_hint(image_id, images)}."
            )
        annotations[image_id].append(annotation)
    return list(zip(images.values(), annotations.values()))


def _hint(identity: Id, listed: Mapping[Id, Any]) -> str:
    """Says that an id is listed in another form, if it is."""
    other = other_form(identity)
    return "" if other not in listed else f" (but {shown(other)} is: write ids in one way, as numbers or as text)"


def file_names(entries: Sequence[Entry], name: str, folder: Path, root: Path) -> list[str]:
    """The names of the image files relative to `folder`; see `read_file_name`.

    Raises:
      UserError: an image has none, or one that leads out of `root`.
    """
    names = []
    for image, _ in entries:
        try:
            names.append(read_file_name(image, folder, root))
        except FieldError as error:
            raise UserError(f"Image {shown(image['id'])} of {name} {error}.") from error
    return names


class Parsed(NamedTuple):
    """The fields of a `Dataset` that follow from its annotations."""

    classes: Classes
    records: Records
    truth: GroundTruth
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
      UserError: there are no categories, a category is listed twice, the categories are not `classes`, an annotation's
        category is not listed, or a field that is needed is missing or cannot be understood.
    """
    classes = _parse_categories(categories, name, classes)
    parser = _Parser(name, classes, masks)
    records = Records.pack(map(parser.parse, entries), images, with_masks=masks)
    return Parsed(classes, records, parser.truth.finish(), tuple(parser.dropped_boxes), tuple(parser.dropped_masks))


def read_categories(categories: Sequence[Mapping[str, Any]], name: str) -> Classes:
    """The categories that `name` lists, in their order there.

    Raises:
      UserError: there are none, one is listed twice, or has no id or no name.
    """
    listed: dict[Id, str] = {}
    for place, category in enumerate(categories):
        try:
            number, text = read_id(category, "id"), read_text(category, "name")
        except FieldError as error:
            raise UserError(f"Category {shown(category.get('id', place))} of {name} {error}.") from error
        if number in listed:
            raise UserError(f"{name} lists the category id {shown(number)} twice.")
        listed[number] = text
    if not listed:
        raise UserError(f"{name} lists no categories.")
    return Classes(tuple(listed.values()), tuple(listed))


def _parse_categories(categories: Sequence[Mapping[str, Any]], name: str, classes: Classes | None) -> Classes:
    own = read_categories(sorted(categories, key=_category_order), name)
    if classes is not None and classes.as_set() == own.as_set():
        # A model that was converted from elsewhere may have them in another order, which its labels refer to.
        return classes
    if classes is not None:
        raise UserError(f"The categories of {name} are not those that the model knows: {_compare(own, classes)}.")
    return own


def _category_order(category: Mapping[str, Any]) -> tuple[bool, Id]:
    """The key by which categories are sorted: their ids; those without one are refused anyway."""
    try:
        return id_order(read_id(category, "id"))
    except FieldError:
        return False, 0


def _compare(own: Classes, known: Classes) -> str:
    """In what the classes of a file differ from those that they should be, for a message."""
    parts = []
    for what, one, other in (("it lacks", known, own), ("it has", own, known)):
        different = [pair for pair in zip(one.category_ids, one.names) if pair not in other.as_set()]
        some = ", ".join(f"{shown(number)} {text}" for number, text in different[:NAMED])
        more = f" and {len(different) - NAMED} more" if len(different) > NAMED else ""
        parts += [f"{what} {some}{more}"] if different else []
    return ", and ".join(parts)


class _Parser:
    """Turns the entries of a split into annotations of images, and keeps what evaluators want, and what is wrong.

    Attributes:
      truth: all annotations whose box is four finite numbers.
      dropped_boxes, dropped_masks: what is wrong with annotations.
    """

    def __init__(self, name: str, classes: Classes, masks: bool):
        self.name, self.masks = name, masks
        self.label_of = {category: label for label, category in enumerate(classes.category_ids)}
        self.truth = GroundTruth.Packer()
        self.dropped_boxes: list[Problem] = []
        self.dropped_masks: list[Problem] = []

    def parse(self, entry: Entry) -> ImageAnnotations:
        """What is annotated of an image.

        Raises:
          UserError: a field is missing or cannot be understood, or a category is not listed.
        """
        image, annotations = entry
        try:
            image_id, width, height = read_id(image, "id"), read_side(image, "width"), read_side(image, "height")
        except FieldError as error:
            raise UserError(f"Image {shown(image.get('id'))} of {self.name} {error}.") from error
        self.truth.begin_image()
        boxes, labels, masks = [], [], []
        crowds: list[Mask] = []
        for annotation in annotations:
            try:
                label, crowd = self._label(annotation), read_crowd(annotation)
            except FieldError as error:
                raise UserError(f"Annotation {_subject(annotation, image_id)} in {self.name} {error}.") from error
            mask = self._mask(annotation, image_id, height, width)
            xywh, reason = box_or_bounds(annotation, height, width)
            if xywh is None:
                self._drop_box(annotation, image_id, reason)
            else:
                area = read_area(annotation, xywh[2] * xywh[3], width * height)
                self.truth.add(label, xywh, area, crowd, annotation.get("id"))
            if crowd:
                crowds += [] if mask is None else [mask]
                continue
            box, reason = clip_box(xywh, width, height) if xywh is not None else ((), "")
            if reason:
                self._drop_box(annotation, image_id, reason)
            if box:
                boxes.append(box)
                labels.append(label)
                masks.append(mask)
        return ImageAnnotations(
            image_id=image_id,
            height=height,
            width=width,
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=np.array(labels, np.int32),
            masks=tuple(masks) if self.masks else (),
            crowds=tuple(crowds),
        )

    def _label(self, annotation: Mapping[str, Any]) -> int:
        category = read_id(annotation, "category_id")
        if category not in self.label_of:
            hint = _hint(category, self.label_of)
            raise FieldError(f"has the category {shown(category)}, which is not listed{hint}")
        return self.label_of[category]

    def _drop_box(self, annotation: Mapping[str, Any], image_id: Id, reason: str) -> None:
        box = shown(annotation.get("bbox"))
        self.dropped_boxes.append(Problem(f"annotation {_subject(annotation, image_id)}: box {box}", reason))

    def _mask(self, annotation: Mapping[str, Any], image_id: Id, height: int, width: int) -> Mask | None:
        """The mask of an annotation, if masks are read; None if it has none or an impossible one, which is noted."""
        segmentation = annotation.get("segmentation") if self.masks else None
        if not segmentation:
            return None
        try:
            return parse_segmentation(segmentation, height, width)
        except MalformedMaskError as error:
            self.dropped_masks.append(Problem(f"annotation {_subject(annotation, image_id)}: its segmentation", str(error)))
            return None


def _subject(annotation: Mapping[str, Any], image_id: Id) -> str:
    """What of an annotation messages name, behind the word."""
    return f"{shown(annotation.get('id'))} of image {shown(image_id)}"


def box_or_bounds(annotation: Mapping[str, Any], height: int, width: int) -> tuple[XYWH | None, str]:
    """The box of an annotation as `read_box` returns it; if there is no `bbox`, the bounds of the segmentation."""
    if annotation.get("bbox") not in (None, []) or not annotation.get("segmentation"):
        return read_box(annotation)
    try:
        return mask_box(parse_segmentation(annotation["segmentation"], height, width)), ""
    except MalformedMaskError:
        return read_box(annotation)


def clip_box(xywh: XYWH, width: float, height: float) -> tuple[tuple[float, ...], str]:
    """Turns COCO's (left, top, width, height) into xyxy, clipped to an image of this size.

    Returns:
      The box and "", or () and the reason why the box is impossible.
    """
    left, top, w, h = xywh
    if w < 1 or h < 1:
        return (), "is less than a pixel wide or high"
    box = (max(left, 0.0), max(top, 0.0), min(left + w, width), min(top + h, height))
    if box[2] <= box[0] or box[3] <= box[1]:
        return (), "lies outside the image"
    return box, ""
