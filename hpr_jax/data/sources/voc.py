"""The format of Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC): an XML file for each image.

Its own layout has `Annotations/*.xml`, `JPEGImages/`, and lists of images in `ImageSets/Main/{train,val,trainval,test}.txt`.
Exports of Roboflow have the XML files beside the images, in `train/` and `valid/`.

Corners are pixels counted from 1, and belong to the box: `xmin` to `xmax` are COCO's `xmin - 1` to `xmax`, as Detectron2 and
supervision read them, too.

Objects that are `difficult` become crowds (`iscrowd=1`), which is the nearest that COCO's evaluators have to VOC's rule: a
difficult object need not be found, and any number of detections of it are neither right nor wrong. One thing differs:
whether a detection is one of a crowd is decided by the part of the detection that lies inside, where VOC takes the IoU, so
that small detections inside of a difficult object are not counted as wrong either. Crowds are no objects to train on.

There is no list of classes: they are the names in both splits, sorted.
"""

import dataclasses
import functools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hpr_jax.data.dataset import Classes
from hpr_jax.data.images import SUFFIXES, read_size
from hpr_jax.data.sources.coco import Content
from hpr_jax.data.sources.coco_entries import Entry
from hpr_jax.data.sources.coco_fields import FieldError, read_crowd, read_number, read_text
from hpr_jax.data.sources.files import (
    LARGEST_ANNOTATIONS,
    LARGEST_LIST,
    below,
    is_file,
    is_folder,
    names_with_suffix,
    read_bytes,
    read_lines,
)
from hpr_jax.data.sources.source import TRAINING, VALIDATION, ReadSplit, Source, choose_splits
from hpr_jax.errors import UserError, shown

# Folders of annotations, and those of their images.
FOLDERS = (("Annotations", "JPEGImages"), ("Annotations", "images"), ("annotations", "images"))
# Lists of images, below the folder of the data.
LISTS = "ImageSets/Main"
# Behind the name of an image, lists of one class say whether it is in it.
_PRESENCE = re.compile(r"\s+(-1|0|1)$")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of annotations, and the one of their images."""

    annotations: Path
    images: Path

    @functools.cached_property
    def stems(self) -> Mapping[str, str]:
        """The image files by their names without suffix. Of several, the first one in order is taken."""
        return {Path(name).stem: name for name in reversed(names_with_suffix(self.images, *SUFFIXES))}

    def names(self) -> list[str]:
        """The names of all annotation files without suffix, sorted."""
        return [Path(name).stem for name in names_with_suffix(self.annotations, ".xml") if name.endswith(".xml")]


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of a split.

    Attributes:
      name: the name that messages give it.
      folder: where its files are.
      names: names of its annotation files, without suffix.
    """

    name: str
    folder: Folder
    names: Sequence[str]


def find_voc(directory: Path) -> Source | None:
    """What reads a folder in the format of Pascal VOC; None if it is not in it.

    Raises:
      UserError: a list of images names one without annotations.
    """
    whole = _find_folder(directory)
    if whole is not None:
        lists = {word: directory / LISTS / f"{word}.txt" for word in (*TRAINING, *VALIDATION)}
        files, note = choose_splits({word: path for word, path in lists.items() if is_file(path)})
        chosen = {split: Split(str(path), whole, _read_list(path, whole)) for split, path in files.items()}
        chosen = chosen or {"train": Split(str(whole.annotations), whole, whole.names())}
    else:
        folders = {word: _find_folder(directory / word) for word in (*TRAINING, *VALIDATION)}
        found, note = choose_splits({word: folder for word, folder in folders.items() if folder is not None})
        chosen = {split: Split(str(folder.annotations), folder, folder.names()) for split, folder in found.items()}
    if not chosen:
        return None
    readers: dict[str, ReadSplit] = {
        split: functools.partial(_read, directory, tuple(chosen.values()), chosen[split]) for split in chosen
    }
    return Source(directory, "Pascal VOC", readers, note)


def _find_folder(directory: Path) -> Folder | None:
    """The annotation files in a folder: in folders of their own, or beside the images."""
    for annotations, images in FOLDERS:
        folder = Folder(directory / annotations, directory / images)
        if is_folder(folder.images) and folder.names():
            return folder
    beside = Folder(directory, directory)
    return beside if any(name in beside.stems for name in beside.names()) else None


def _read_list(path: Path, folder: Folder) -> list[str]:
    """The names in a list of images.

    Raises:
      UserError: it names an image without annotations, or leads out of their folder.
    """
    known, names = set(folder.names()), []
    for number, line in enumerate(read_lines(path, LARGEST_LIST), 1):
        name = line if line in known else _PRESENCE.sub("", line)
        if not name:
            continue
        if name not in known:
            file = folder.annotations / f"{name}.xml"
            reason = "does not exist" if below(folder.annotations, file) else "leads out of its folder"
            raise UserError(
                f"{path}, line {number} names {shown(name)}, whose annotation file in {folder.annotations} {reason}; "
                "leave the line out, or add the file."
            )
        names.append(name)
    return names


def _read(directory: Path, splits: Sequence[Split], own: Split, classes: Classes | None) -> Content:
    """Reads a split.

    Args:
      splits: all splits, whose classes count.
      own: the one that is read.

    Raises:
      UserError: an annotation file is broken, or the split has no images.
    """
    if not own.names:
        raise UserError(f"{own.name} lists no images; add some.")
    parsed = _parse(directory, own)
    names = {entry["name"] for _, objects in parsed for entry in objects}
    if classes is not None and names <= set(classes.names) and len(set(classes.names)) == len(classes.names):
        # Not every class need have an object in this split.
        ids = dict(zip(classes.names, classes.category_ids))
    else:
        others = (_parse(directory, other) for other in splits if other is not own)
        names |= {entry["name"] for other in others for _, objects in other for entry in objects}
        ids = {name: number for number, name in enumerate(sorted(names), 1)}
    entries: list[Entry] = []
    for number, (image, objects) in enumerate(parsed, 1):
        annotations = [
            {**fields, "image_id": number, "category_id": ids[name]} for name, fields in map(_split_name, objects)
        ]
        entries.append(({"id": number, **image}, annotations))
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return Content.make(own.name, own.folder.images, categories, entries)


def _split_name(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return fields["name"], {key: value for key, value in fields.items() if key != "name"}


def _parse(directory: Path, split: Split) -> list[Entry]:
    """The images of a split, and their objects with the fields of COCO's annotations and the `name` of their class.

    Raises:
      UserError: an annotation file is broken.
    """
    return [
        _parse_file(directory, split.folder, name)
        for name in tqdm(split.names, desc="annotations", unit="image", leave=False, delay=2)
    ]


def _parse_file(directory: Path, folder: Folder, name: str) -> Entry:
    path = folder.annotations / f"{name}.xml"
    root = parse_xml(path)
    if root.tag != "annotation":
        raise UserError(f"{path} is no annotation of Pascal VOC: it holds <{root.tag:.60}>, not <annotation>.")
    file_name = _find_image(folder, name, (root.findtext("filename") or "").strip())
    height, width = _size(root) or read_size(folder.images / file_name) or (1, 1)
    relative = path.relative_to(directory).as_posix()
    objects = [
        _parse_object(element, directory, f"{relative}, object {number}")
        for number, element in enumerate(root.iterfind("object"), 1)
    ]
    return {"file_name": file_name, "height": height, "width": width}, objects


class _DeclaresTypeError(Exception):
    """A file declares a document type."""


class _TreeBuilder(ET.TreeBuilder):
    """Refuses document types. They declare entities, of which a small file can make any length of text."""

    def doctype(self, name: str, pubid: str, system: str) -> None:
        raise _DeclaresTypeError


def parse_xml(path: Path) -> ET.Element:
    """The root of an XML file that declares no entities.

    Raises:
      UserError: it is no XML, or declares a document type.
    """
    data, parser = read_bytes(path, LARGEST_ANNOTATIONS), ET.XMLParser(target=_TreeBuilder())
    try:
        parser.feed(data)
        return parser.close()
    except _DeclaresTypeError:
        raise UserError(f"{path} declares a document type (DOCTYPE), which annotations have none of; take it out.") from None
    except ET.ParseError as error:
        raise UserError(f"{path}, line {error.position[0]} is not XML; mend it, or take the file away.") from None
    except (ValueError, LookupError):
        raise UserError(f"{path} is XML in an encoding that is not known; save it in UTF-8.") from None


def _find_image(folder: Folder, name: str, written: str) -> str:
    """The name of an image file, relative to the folder of images.

    Files and annotations that are renamed together keep the old name inside, so that the names of the files count more than
    the one that is written in the annotation.
    """
    if Path(written).stem == name and is_file(folder.images / written) and below(folder.images, folder.images / written):
        return written
    if name in folder.stems:
        return folder.stems[name]
    return written or f"{name}.jpg"


def _size(root: ET.Element) -> tuple[int, int] | None:
    """The annotated (height, width) of an image; None if there is none, as some tools write 0 or nothing."""
    sides = [read_number(root.findtext(f"size/{side}")) for side in ("height", "width")]
    height, width = (0 if side is None or not math.isfinite(side) else int(side) for side in sides)
    return (height, width) if height > 0 and width > 0 else None


def _parse_object(element: ET.Element, directory: Path, name: str) -> dict[str, Any]:
    """An object with the fields of an annotation of COCO; its `bbox` holds texts where there are no numbers, which is then
    reported.

    Raises:
      UserError: it has no class, or it cannot be understood whether it is difficult.
    """
    try:
        label = read_text({"name": (element.findtext("name") or "").strip()}, "name")
    except FieldError as error:
        raise UserError(f"{directory / name} {error}; name its class there.") from error
    difficult = element.findtext("difficult")
    try:
        crowd = read_crowd({"iscrowd": difficult})
    except FieldError:
        raise UserError(f"{directory / name} has {shown(difficult)} as difficult, which is neither 0 nor 1.") from None
    return {"id": name, "name": label, "bbox": _box(element), "iscrowd": int(crowd)}


def _box(element: ET.Element) -> list[Any]:
    """COCO's box, (left, top, width, height) from 0 on, of VOC's corners, which are counted from 1."""
    texts = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = map(read_number, texts)
    if left is None or top is None or right is None or bottom is None:
        return texts
    return [left - 1, top - 1, right - left + 1, bottom - top + 1]


def missing_part(directory: Path) -> str:
    """What a folder of Pascal VOC lacks, if it has one of the folders but not the other; else ""."""
    for annotations, images in FOLDERS:
        has = [is_folder(directory / name) for name in (annotations, images)]
        if has == [True, False] and names_with_suffix(directory / annotations, ".xml"):
            return f"{directory / annotations} has annotations of Pascal VOC, but there is no folder {directory / images}"
        if has == [False, True] and images == "JPEGImages":
            return (
                f"{directory / images} has images as Pascal VOC has them, but there is no folder {directory / annotations}"
            )
    return ""
