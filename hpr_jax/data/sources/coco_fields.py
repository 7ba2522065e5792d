"""The fields of COCO's entries as exporters write them, and the values that they mean.

Exporters differ in what they leave out, and in which numbers they write as text. What can be understood is; anything else is
a `FieldError`, whose message completes a sentence that begins with the name of an entry.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpr_jax.data.dataset import Id
from hpr_jax.errors import shown

# The longest side that an image may be annotated with, in pixels.
LONGEST_SIDE = 1_000_000
# What texts in `iscrowd` may say, in lower case.
NO_CROWD = frozenset({"", "0", "0.0", "false", "no", "n", "f", "none", "null"})
CROWD = frozenset({"1", "1.0", "true", "yes", "y", "t"})


class FieldError(Exception):
    """A field cannot be understood. The message says why, and completes a sentence that begins with the entry's name."""


def read_id(entry: Mapping[str, Any], key: str) -> Id:
    """The id in a field: a whole number or a text.

    Raises:
      FieldError: there is no such field, or it is neither.
    """
    value = _present(entry, key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _clean(value, key)
    raise FieldError(f"has the {key} {shown(value)}, which is neither a whole number nor text")


def other_form(identity: Id) -> Id | None:
    """The same id as text, or as a number; None if a text is no whole number."""
    if isinstance(identity, int):
        return str(identity)
    try:
        return int(identity)
    except ValueError:
        return None


def read_text(entry: Mapping[str, Any], key: str) -> str:
    """The text in a field, which must not be empty; numbers count as text.

    Raises:
      FieldError: there is no text, or it has characters that no file can have.
    """
    value = _present(entry, key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise FieldError(f"has the {key} {shown(value)}, which is no text")
    return _clean(value, key)


def _present(entry: Mapping[str, Any], key: str) -> Any:
    if entry.get(key) is None:
        raise FieldError(f"has no {key}")
    return entry[key]


def _clean(text: str, key: str) -> str:
    """Refuses text that cannot be written to files: with NUL, or with half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FieldError(f"has the {key} {text[:60]!r}, which is not valid Unicode") from None
    if "\0" in text:
        raise FieldError(f"has the {key} {text[:60]!r}, which contains a NUL character")
    return text


def read_number(value: Any) -> float | None:
    """The number that a value is, or is the text of; None if it is none. It may be infinite or NaN."""
    if type(value) is float:
        # The usual case, at a tenth of the time of the others.
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def read_side(image: Mapping[str, Any], key: str) -> int:
    """The width or height of an image, in whole pixels.

    Raises:
      FieldError: there is none, or it is no possible one.
    """
    side = read_number(_present(image, key))
    if side is None:
        raise FieldError(f"has the {key} {shown(image[key])}, which is no number")
    if not 1 <= side <= LONGEST_SIDE:
        raise FieldError(f"has the {key} {shown(image[key])}; it must be from 1 to {LONGEST_SIDE:,} pixels")
    return int(side)


def read_box(annotation: Mapping[str, Any]) -> tuple[tuple[float, float, float, float] | None, str]:
    """The `bbox` of an annotation: (left, top, width, height), four finite numbers, and ""; or None and what is wrong."""
    bbox = annotation.get("bbox")
    numbers = [read_number(item) for item in bbox] if isinstance(bbox, list | tuple) else []
    if len(numbers) != 4 or None in numbers:
        return None, "does not have four numbers"
    left, top, width, height = (number for number in numbers if number is not None)
    if not all(map(math.isfinite, (left, top, width, height))):
        return None, "is not finite"
    return (left, top, width, height), ""


def read_crowd(annotation: Mapping[str, Any]) -> bool:
    """Whether `iscrowd` says that an annotation is a crowd.

    Raises:
      FieldError: it says neither yes nor no.
    """
    value = annotation.get("iscrowd")
    if value is None or value in (0, 1):
        return bool(value)
    text = value.strip().lower() if isinstance(value, str) else None
    if text not in NO_CROWD and text not in CROWD:
        raise FieldError(f"has the iscrowd {shown(value)}, which is neither 0 nor 1")
    return text in CROWD


def read_area(annotation: Mapping[str, Any], box_area: float, image_area: float) -> float:
    """The area of an object in square pixels, which decides whether evaluators count it as small, medium or large.

    It is the area of the box where the file has none, or one that no object in the image can have.
    """
    area = read_number(annotation.get("area"))
    return area if area is not None and 0 < area <= image_area else min(max(box_area, 0.0), image_area)


def read_file_name(image: Mapping[str, Any], folder: Path, root: Path) -> str:
    """The name of an image file, relative to `folder`.

    Names with the `\\` of Windows are understood where there is no such file, but one with `/`.

    Raises:
      FieldError: there is no name, or it leads out of `root`, the folder of the data, which must not happen: whoever wrote
        the annotations could have any file of this machine read, or copied.
    """
    name = read_text(image, "file_name")
    if "\\" in name and not (folder / name).exists() and (folder / name.replace("\\", "/")).exists():
        name = name.replace("\\", "/")
    # Other names lead nowhere but down. Links in the folder are its owner's, and may lead anywhere.
    if name.startswith("/") or ".." in name:
        path = _normal(folder / name)
        if not any(path.is_relative_to(_normal(place)) for place in (folder, root)):
            raise FieldError(f"has the file_name {shown(name)}, which leads out of the folder {root}")
    return name


def _normal(path: Path) -> Path:
    """The path from the root, without `..`."""
    return Path(os.path.normpath(path.absolute()))
