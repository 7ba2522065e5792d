"""Folders of COCO annotations that are laid out in other ways than COCO's own, like those that Roboflow exports.

An annotation file lies in the folder, in `annotations/`, or in the folder of its split; its name or that of its folder says
which split it is of. A single file whose name says nothing has all images.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.coco import LISTS, Content, read_content
from hpr_jax.data.sources.coco_fields import FieldError, read_file_name
from hpr_jax.data.sources.files import first_of, is_file, is_folder, names_with_suffix
from hpr_jax.data.sources.source import TRAINING, VALIDATION, Source, choose_splits
from hpr_jax.errors import UserError, shown

# The name of an annotation file in a folder of images, as Roboflow exports it.
ROBOFLOW = "_annotations.coco.json"
# In a folder with more of them, JSON files are annotations of an image each, in another format.
MOST_FILES = 30
# Folders of annotation files, below the data's folder or that of a split.
FOLDERS = ("", "annotations", "Annotations")
# Of so many images files are looked for, to find out in which folder they are.
LOOKED_FOR = 20


def find_coco_folder(directory: Path) -> Source | None:
    """What reads a folder of COCO annotations; None if it has none.

    Raises:
      UserError: it has more than one annotation file for a split.
    """
    by_word: dict[str, list[Path]] = {}
    for path in coco_files(directory):
        by_word.setdefault(_split_word(path, directory), []).append(path)
    if not by_word:
        return None
    unnamed = by_word.pop("", [])
    found, note = choose_splits(by_word or {TRAINING[0]: unnamed})
    chosen = {split: _only(paths, split if by_word else "", directory) for split, paths in found.items()}
    splits = {split: functools.partial(_read, directory, path) for split, path in chosen.items()}
    roboflow = all(path.name == ROBOFLOW for path in chosen.values())
    return Source(directory, "COCO as Roboflow exports it" if roboflow else "COCO", splits, note)


def coco_files(directory: Path) -> list[Path]:
    """The annotation files in the folders where they usually are."""
    return [path for path in json_files(directory) if looks_like_coco(path)]


def json_files(directory: Path) -> Iterator[Path]:
    """The JSON files in the folders where annotation files usually are."""
    folders = [directory / split / name for split in ("", *TRAINING, *VALIDATION) for name in FOLDERS]
    # A file system that knows no capital letters has one folder by two names.
    for folder in {folder.resolve(): folder for folder in folders}.values():
        names = names_with_suffix(folder, ".json")
        if len(names) <= MOST_FILES:
            yield from (folder / name for name in names)


def looks_like_coco(path: Path) -> bool:
    """Whether a JSON file has the words of COCO's lists, which is quicker to say than to parse it."""
    data = path.read_bytes()
    return all(f'"{key}"'.encode() in data for key in LISTS)


def _split_word(path: Path, directory: Path) -> str:
    """The word for a split in the name of a file, or in that of the folders that it is in; "" if there is none."""
    for name in (path.stem, *reversed(path.parent.relative_to(directory).parts)):
        words = re.findall(r"[a-z]+", name.lower())
        word = next((word for word in words if word in TRAINING or word in VALIDATION), None)
        if word:
            return word
    return ""


def _only(paths: Sequence[Path], word: str, directory: Path) -> Path:
    """The annotation file of a split. COCO has others beside those of its objects, `instances`.

    Raises:
      UserError: there is more than one.
    """
    instances = [path for path in paths if "instances" in path.name]
    paths = instances if len(instances) == 1 else paths
    if len(paths) > 1:
        names = first_of([str(path.relative_to(directory)) for path in paths])
        raise UserError(
            f"{directory} has {len(paths)} annotation files {f'for {word}' if word else 'of no split'}, {names}; set "
            "config.data.train_annotations, train_images, val_annotations and val_images, or leave one file there."
        )
    return paths[0]


def _read(directory: Path, path: Path, classes: Classes | None) -> Content:
    """Reads an annotation file, and finds its images.

    Raises:
      UserError: the file is broken, or no folder has its images.
    """
    # The folder of the images follows from what is read.
    content = read_content(path, directory)
    images = [image for image, _ in content.entries[:LOOKED_FOR]]
    if not images:
        return content
    folders = list(_image_folders(directory, path))
    counts = [_count(images, folder, directory) for folder in folders]
    if not any(counts):
        names = first_of([str(folder) for folder in folders])
        raise UserError(
            f"The images of {path}, like {shown(images[0].get('file_name'))}, are in none of the folders {names}; set "
            "config.data.*_annotations and config.data.*_images."
        )
    return dataclasses.replace(content, folder=folders[counts.index(max(counts))])


def _image_folders(directory: Path, path: Path) -> Iterator[Path]:
    """The folders in which the images of an annotation file may be, the likeliest ones first."""
    word = _split_word(path, directory)
    # Of instances_train2014 also train2014.
    names = dict.fromkeys([*re.findall(rf"{word}\d+", path.stem.lower()), word]) if word else {}
    places = [path.parent, *(directory / "images" / name for name in names)]
    for name in names:
        places += [directory / name / "images", directory / name / "data", directory / name]
    places += [path.parent / "images", *(directory / name for name in ("images", "data", "JPEGImages", ""))]
    return (place for place in dict.fromkeys(places) if is_folder(place))


def _count(images: Sequence[Mapping[str, Any]], folder: Path, root: Path) -> int:
    """The number of images whose file is in a folder."""
    count = 0
    for image in images:
        try:
            count += is_file(folder / read_file_name(image, folder, root))
        except (FieldError, OSError):
            # It is refused when the annotations are checked.
            continue
    return count
