"""Checks entries in the form of COCO, whatever format they come from, and makes records of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpr_jax.data.dataset import Classes, GroundTruth, Id, ImageAnnotations, Problem, Records, id_order
from hpr_jax.data.images import EncodedImages
from hpr_jax.data.masks import MalformedMaskError, Mask, mask_box, parse_segmentation
from hpr_jax.data.sources.coco_fields import (
    FieldError,
    other_form,
    read_area,
    read_box,
    read_crowd,
    read_id,
    read_side,
    read_text,
)
from hpr_jax.errors import UserError, shown

# The entry of an image in an annotation file, and those of its annotations.
Entry = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]
# A box as COCO writes it: left, top, width, height.
XYWH = tuple[float, float, float, float]
# At most so many of the classes that differ are named.
NAMED = 8


def id_hint(identity: Id, listed: Mapping[Id, Any]) -> str:
    """Says that an id is listed in another form, if it is."""
    other = other_form(identity)
    return "" if other not in listed else f" (but {shown(other)} is: write ids in one way, as numbers or as text)"


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
            hint = id_hint(category, self.label_of)
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
