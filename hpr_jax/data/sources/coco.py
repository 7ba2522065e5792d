"""The format of COCO (https://cocodataset.org/#format-data): folders of images, and annotations in a JSON file.

Other formats turn their annotations into entries of this one, which `coco_entries.py` checks.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpr_jax.data.dataset import Classes, Dataset, Id
from hpr_jax.data.images import ImageFolder
from hpr_jax.data.sources.coco_entries import Entry, id_hint, parse_entries
from hpr_jax.data.sources.coco_fields import (
    FieldError,
    read_file_name,
    read_id,
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

# The lists of objects in an annotation file.
LISTS = ("images", "annotations", "categories")


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
                f"listed{id_hint(image_id, images)}."
            )
        annotations[image_id].append(annotation)
    return list(zip(images.values(), annotations.values()))


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
