"""Recognises in which format a folder of data is, and says what is near if it is in none.

To add a format, write `sources/NAME.py` with a function `find_NAME(directory)` that returns a `Source`, or None if the
folder has another format, and add it to `FINDERS`. The easiest way is to turn annotations into entries of COCO form, which
are then checked like those of COCO itself.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpr_jax.data.sources import coco_folder, voc, yolo
from hpr_jax.data.sources.files import find_image_files, first_of, is_folder
from hpr_jax.data.sources.source import Source
from hpr_jax.data.sources.tfds import is_tfds
from hpr_jax.errors import UserError

# A folder is read in the first format that it has.
FINDERS: tuple[Callable[[Path], Source | None], ...] = (
    coco_folder.find_coco_folder,
    yolo.find_yolo,
    voc.find_voc,
)
# The names of COCO's own layout, which the settings have unless others are asked for.
COCO_NAMES = {
    "train_images": "train2017",
    "train_annotations": "annotations/instances_train2017.json",
    "val_images": "val2017",
    "val_annotations": "annotations/instances_val2017.json",
}
# In at most so many folders below a folder is looked for data.
_MOST_FOLDERS = 100


def names_leave_open(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the settings leave open what a folder holds.

    They do not if they name other files than those of COCO's own layout, if the folder has a split in that layout, or if it
    is the directory of a TFDS data set.
    """
    if not directory.is_dir() or is_tfds(directory, "") or any(settings[key] != name for key, name in COCO_NAMES.items()):
        return False
    return not any(
        (directory / COCO_NAMES[f"{split}_annotations"]).exists() and (directory / COCO_NAMES[f"{split}_images"]).is_dir()
        for split in ("train", "val")
    )


def recognize(directory: Path) -> Source | None:
    """What reads a folder; None if it is in no known format.

    Raises:
      UserError: it is in one, but something is wrong.
    """
    found = (find(directory) for find in FINDERS)
    return next((source for source in found if source is not None), None)


def unrecognized(directory: Path) -> str:
    """A sentence on a folder that is in no known format: what is near, and what is wanted."""
    sub = next((folder for folder in _folders_below(directory) if _is_recognized(folder)), None)
    if sub is not None:
        return f"{directory} has a data set below it; set --config.data.directory={sub}."
    near = yolo.missing_data_file(directory) or voc.missing_part(directory)
    if near:
        return f"{near}."
    wanted = (
        "COCO's annotations in a JSON file, YOLO's data.yaml, Pascal VOC's Annotations and JPEGImages, or a TFDS directory"
    )
    others = [str(path.relative_to(directory)) for path in coco_folder.json_files(directory)]
    if others:
        what = f"the JSON of {first_of(others)} has no lists of images, annotations and categories"
    elif next(find_image_files(directory), None) is not None:
        what = "there are images, but no annotations"
    else:
        what = "there are neither images nor annotations"
    return f"{directory} holds no data set that is known ({wanted}): {what}."


def _folders_below(directory: Path) -> Iterator[Path]:
    """Some of the folders in a folder and in its folders."""
    inner = sorted(path for path in directory.iterdir() if is_folder(path))[:_MOST_FOLDERS]
    yield from inner
    for folder in inner:
        yield from sorted(path for path in folder.iterdir() if is_folder(path))[:_MOST_FOLDERS]


def _is_recognized(directory: Path) -> bool:
    try:
        return recognize(directory) is not None
    except UserError:
        return True
