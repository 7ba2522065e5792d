"""The format of Ultralytics' YOLO (https://docs.ultralytics.com/datasets/detect): `data.yaml` names the classes and the
images of each split, and a text file for each image has a line for each object.

A line is `class centre_x centre_y width height`, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon, in fractions of the image's
sides. The text file of `images/train/a.jpg` is `labels/train/a.txt`; where no folder is called `images` it lies beside the
image. Images without a text file have no objects.

The folder of the data is the one that `data.yaml` lies in, and no path in it leads out of that. Ultralytics takes its `path`
relative to a folder of its own settings, so that a relative one often names the folder of the data itself, which is
understood.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from hpr_jax.data.dataset import Classes, Id
from hpr_jax.data.images import read_size
from hpr_jax.data.sources.coco import Content, ids_of_names
from hpr_jax.data.sources.coco_entries import Entry
from hpr_jax.data.sources.coco_fields import read_number
from hpr_jax.data.sources.files import (
    LARGEST_ANNOTATIONS,
    LARGEST_LIST,
    below,
    common_folder,
    find_image_files,
    is_file,
    is_folder,
    read_bytes,
    read_lines,
)
from hpr_jax.data.sources.source import TRAINING, VALIDATION, Source, choose_splits
from hpr_jax.errors import UserError, shown

# The names that the file with the classes may have, beside that of its folder.
DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
# Such a file may have at most so many bytes, since PyYAML takes seconds for a million.
LARGEST_DATA_FILE = 2**20
# What stands for no value in YAML.
_NOTHING = frozenset({"", "~", "null", "Null", "NULL", "None"})
# Threads that read the sizes of images, which is waiting most of all.
_THREADS = 8
# The place of a box that cannot be computed, in the report on what is dropped.
_NO_SIZE = "unknown, since its image cannot be read"

log = logging.getLogger("hpr_jax")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """What `data.yaml` says.

    Attributes:
      path: the file.
      base: folder that the paths of the splits are relative to.
      names: the classes, by the number that labels give them.
      splits: folders and lists of images of each split, by the word that names it.
      keypoints: whether lines have keypoints behind their box.
    """

    path: Path
    base: Path
    names: Mapping[int, str]
    splits: Mapping[str, Sequence[str]]
    keypoints: bool

    @property
    def directory(self) -> Path:
        """The folder of the data."""
        return self.path.parent


def find_yolo(directory: Path) -> Source | None:
    """What reads a folder in YOLO's format; None if it has no `data.yaml`.

    Raises:
      UserError: that file is not as it should be.
    """
    path = find_data_file(directory)
    if path is None:
        return None
    data = read_data_file(path)
    chosen, note = choose_splits({word: functools.partial(_read, data, word) for word in data.splits})
    if not chosen:
        raise UserError(f"{path} names no images; add train and val, the folders of images of both splits.")
    return Source(directory, "YOLO", chosen, note)


def find_data_file(directory: Path) -> Path | None:
    """The file that names the classes; None if there is none."""
    own = (f"{directory.resolve().name}{suffix}" for suffix in (".yaml", ".yml"))
    return next((directory / name for name in (*DATA_FILES, *own) if is_file(directory / name)), None)


def read_data_file(path: Path) -> DataFile:
    """Reads `data.yaml`.

    Raises:
      UserError: it is no YAML, names no classes, or leads out of its folder.
    """
    content = _parse_yaml(path)
    splits = {word: _texts(path, word, content[word]) for word in (*TRAINING, *VALIDATION) if word in content}
    return DataFile(
        path=path,
        base=_base(path, content.get("path", "")),
        names=_names(path, content),
        splits={word: entries for word, entries in splits.items() if entries},
        keypoints="kpt_shape" in content,
    )


def _parse_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file, all of whose values are texts, lists and dicts.

    No other types are made: in YAML, a class called `no` would be False. Merged keys, which could make a small file fill the
    memory, stay as they are.

    Raises:
      UserError: the file is no YAML, or something else than keys with values.
    """
    data = read_bytes(path, LARGEST_DATA_FILE)
    try:
        content = yaml.load(data, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{place} is not YAML as Ultralytics writes it; compare it with one of its examples."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not YAML as Ultralytics writes it: it needs the keys names, train and val.")
    return content


def _texts(path: Path, key: str, value: Any) -> list[str]:
    """The texts in a list, or the text that stands in its place.

    Raises:
      UserError: there is something else.
    """
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise UserError(f"{path} has the {key} {shown(value)}; write a path there, or a list of paths.")
    return [one for one in values if one not in _NOTHING]


def _names(path: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """The classes by their number.

    Raises:
      UserError: there are none, or the file contradicts itself.
    """
    count, names = _whole_number(content.get("nc", "")), content.get("names")
    if names is None and count is not None and 0 < count <= 10_000:
        # Ultralytics' names for classes without any.
        return {number: f"class_{number}" for number in range(count)}
    if not isinstance(names, list | dict) or not names:
        raise UserError(f"{path} lists no classes; add names, a list of them.")
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    classes: dict[int, str] = {}
    for key, name in pairs:
        number = _whole_number(key)
        if number is None or number < 0 or number in classes:
            raise UserError(f"{path} gives a class the number {shown(key)}; number them from 0 on, each differently.")
        if not isinstance(name, str) or not name:
            raise UserError(f"{path} gives class {number} the name {shown(name)}; write text there.")
        classes[number] = name
    if count is not None and count != len(classes):
        raise UserError(f"{path} says that there are {count} classes (nc), and names {len(classes)}; mend one of the two.")
    return dict(sorted(classes.items()))


def _whole_number(text: Any) -> int | None:
    """The whole number that a text is; None if it is none."""
    number = read_number(text)
    return int(number) if number is not None and number.is_integer() else None


def _base(path: Path, text: Any) -> Path:
    """The folder that `path` in the file names.

    Raises:
      UserError: it leads out of the folder that the file lies in.
    """
    directory = path.parent
    if not isinstance(text, str):
        raise UserError(f"{path} has the path {shown(text)}; write a folder there, or leave it out.")
    if text in _NOTHING:
        return directory
    base = _below(directory, directory / text)
    if base is None:
        raise UserError(
            f"{path} has the path {shown(text)}, which leads out of the folder of the data, {directory}; leave the line out."
        )
    # Ultralytics looks for it in a folder of its settings, where it is this one.
    return directory if not is_folder(base) and base.name == directory.resolve().name else base


def _below(root: Path, path: Path) -> Path | None:
    """A path without `..`; None if it leads out of the folder `root`."""
    relative = below(root, path)
    return None if relative is None else root / relative


def _read(data: DataFile, word: str, classes: Classes | None) -> Content:
    """Reads a split.

    Raises:
      UserError: a folder or list is missing or empty, leads out of the data, or a label has no class.
    """
    files = [file for entry in data.splits[word] for file in _images(data, word, entry)]
    if not files:
        raise UserError(f"{data.path} names {word}: {', '.join(data.splits[word])}, where no images are listed; add some.")
    folder = common_folder(data.directory, files)
    ids = dict(zip(data.names, ids_of_names(list(data.names.values()), classes, list(data.names))))
    categories = [{"id": ids[number], "name": name} for number, name in data.names.items()]
    if not any(is_file(data.directory / label_file(file)) for file in files):
        log.warning(
            "None of the %d images that %s names (%s) has a file of labels, like %s.",
            len(files),
            data.path,
            word,
            data.directory / label_file(files[0]),
        )
    return Content.make(f"{data.path} ({word})", folder, categories, list(_entries(data, files, folder, ids)))


def _entries(data: DataFile, files: Sequence[Path], folder: Path, ids: Mapping[int, Id]) -> Iterator[Entry]:
    """The images of a split with their annotations, in COCO form.

    Args:
      files: the images, relative to the folder of the data.
      folder: the one that their names are to be relative to.
      ids: category ids by the numbers of classes.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sizes = pool.map(lambda file: read_size(data.directory / file), files)
        images = tqdm(zip(files, sizes), desc="annotations", total=len(files), unit="image", leave=False, delay=2)
        for number, (file, size) in enumerate(images, 1):
            # An image that cannot be read has any size. It is named when it is to be decoded.
            height, width = size or (1, 1)
            name = (data.directory / file).relative_to(folder).as_posix()
            image = {"id": number, "file_name": name, "height": height, "width": width}
            yield image, _annotations(label_file(file), number, size, data, ids)


def _images(data: DataFile, word: str, entry: str) -> list[Path]:
    """The images in a folder or list that the file names, relative to the folder of the data.

    Raises:
      UserError: there is no such folder or list, or it leads out of the data.
    """
    path = _below(data.directory, data.base / entry)
    # Roboflow writes ../train/images for train/images, and so Ultralytics understands it.
    if entry.startswith("../") and (path is None or not (is_file(path) or is_folder(path))):
        path = _below(data.directory, data.base / entry.removeprefix("../"))
    if path is None:
        raise UserError(
            f"{data.path} names {word}: {entry}, which leads out of the folder of the data; write it relative to "
            f"{data.base}."
        )
    if is_folder(path):
        return sorted(file.relative_to(data.directory) for file in find_image_files(path))
    if is_file(path) and path.suffix.lower() == ".txt":
        return list(_listed(data, path))
    if is_file(path):
        raise UserError(f"{data.path} names {word}: {entry}, which is neither a folder nor a list, whose name ends in .txt.")
    raise UserError(f"{data.path} names the folder {entry}, which is missing; mend its {word}, or move the images there.")


def _listed(data: DataFile, path: Path) -> Iterator[Path]:
    """The images in a list, relative to the folder of the data.

    Raises:
      UserError: a line leads out of the data, or is no possible name.
    """
    for number, line in enumerate(read_lines(path, LARGEST_LIST), 1):
        if not line:
            continue
        places = [_below(data.directory, folder / line) for folder in (path.parent, data.base)]
        inside = [place for place in places if place is not None]
        if not inside:
            raise UserError(
                f"{path}, line {number} names the image {shown(line)}, which leads out of the folder {data.directory}; "
                "write it relative to that."
            )
        file = next((place for place in inside if is_file(place)), inside[0]).relative_to(data.directory)
        if not file.name or "\0" in line:
            raise UserError(f"{path}, line {number} names {shown(line)}, which can be no image; leave the line out.")
        yield file


def label_file(image: Path) -> Path:
    """The file with the labels of an image, both relative to the folder of the data."""
    before, folder, behind = f"/{image.as_posix()}".rpartition("/images/")
    labels = f"{before}/labels/{behind}" if folder else behind
    return Path(labels.removeprefix("/")).with_suffix(".txt")


def _annotations(
    file: Path, image_id: int, size: tuple[int, int] | None, data: DataFile, ids: Mapping[int, Id]
) -> list[dict[str, Any]]:
    """The annotations of an image in COCO form, none if it has no file of labels.

    Args:
      file: that file, relative to the folder of the data.
      size, data, ids: as in `_parse_line`.
    """
    path = data.directory / file
    return [
        {"image_id": image_id, **_parse_line(line, f"{file.as_posix()}, line {place}", size, data, ids)}
        for place, line in enumerate(read_lines(path, LARGEST_ANNOTATIONS) if is_file(path) else (), 1)
        if line
    ]


def _parse_line(line: str, name: str, size: tuple[int, int] | None, data: DataFile, ids: Mapping[int, Id]) -> dict[str, Any]:
    """The annotation of an object in COCO form; its `bbox` is the text where there are no numbers, which is then reported.

    Args:
      name: file and line, for messages.
      size: (height, width) of the image in pixels, None if it cannot be read.
      ids: category ids by the numbers of classes.

    Raises:
      UserError: there is no such class.
    """
    first, *texts = line.split()
    number = _whole_number(first)
    if number is None or number not in ids:
        raise UserError(
            f"{data.directory / name} has the class {shown(first)}, and {data.path} names {len(ids)}, from {min(ids)} to "
            f"{max(ids)}; mend one of the two."
        )
    annotation: dict[str, Any] = {"id": name, "category_id": ids[number], "iscrowd": 0}
    numbers = [value for value in map(read_number, texts) if value is not None]
    if size is None:
        return {**annotation, "bbox": _NO_SIZE}
    # Predictions have their score behind the box.
    if len(numbers) != len(texts) or len(texts) < 4 or (len(texts) > 5 and len(texts) % 2 and not data.keypoints):
        return {**annotation, "bbox": shown(line)}
    height, width = size
    if data.keypoints or len(texts) <= 5:
        return {**annotation, "bbox": _box(numbers[:4], height, width)}
    return {**annotation, **_polygon(numbers, height, width)}


def _box(numbers: Sequence[float], height: int, width: int) -> list[float]:
    """COCO's box in pixels of a box in fractions of the image's sides: centre, width and height."""
    x, y, w, h = numbers
    return [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]


def _polygon(numbers: Sequence[float], height: int, width: int) -> dict[str, Any]:
    """A polygon in pixels as COCO has it, its hull, and its area by the shoelace formula."""
    xs, ys = [x * width for x in numbers[::2]], [y * height for y in numbers[1::2]]
    if not all(map(math.isfinite, (*xs, *ys))):
        return {"bbox": [math.nan] * 4}
    left, top = min(xs), min(ys)
    twice = sum(x * (below_y - above_y) for x, below_y, above_y in zip(xs, ys[1:] + ys[:1], ys[-1:] + ys[:-1]))
    return {
        "bbox": [left, top, max(xs) - left, max(ys) - top],
        "area": abs(twice) / 2,
        "segmentation": [[value for corner in zip(xs, ys) for value in corner]],
    }


def missing_data_file(directory: Path) -> str:
    """What a folder in YOLO's format lacks, if it looks like one but has no `data.yaml`; else ""."""
    folders = [path for path in (directory / "labels", directory / "train" / "labels") if is_folder(path)]
    if not folders or find_data_file(directory) is not None:
        return ""
    return (
        f"{folders[0]} looks like YOLO's labels, but there is no {directory / DATA_FILES[0]}, which lists the classes "
        "(names) and the folders of images (train, val)"
    )
