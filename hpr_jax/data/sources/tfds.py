"""The format of TensorFlow Datasets (https://www.tensorflow.org/datasets): ArrayRecord files, read without TensorFlow.

Records have the features of TFDS's own detection data sets: `image`, and `objects` with `bbox` and `label`. Records that
`scripts/make_tfds` wrote have one more, `coco`: the image's entry and its annotations as in the COCO file. It is read in
place of the others, so that masks are there and nothing is rounded.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from hpr_jax.data.dataset import Classes, Dataset, Id
from hpr_jax.data.decoding import MOST_BITS
from hpr_jax.data.images import UnreadableImageError
from hpr_jax.data.sources.coco import ids_of_names, without_garbage_collection
from hpr_jax.data.sources.coco_entries import Entry, parse_entries
from hpr_jax.data.sources.coco_fields import FieldError, read_id, read_text
from hpr_jax.errors import UserError, shown

# The file that TFDS writes into the directory of each version of a data set.
INFO_FILE = "dataset_info.json"
# The name of our own feature, which holds {"image": entry, "annotations": [entry, ...]} as JSON, and of the part of the data
# set's metadata that holds {"categories": [entry, ...]}.
COCO = "coco"

# The features of a record, by their names.
Features = Mapping[str, Any]
# Reads a record: its features, its index, and an id for its first annotation, should it have none of its own -> its COCO
# entry, and bytes that identify it for the fingerprint.
ReadEntry = Callable[[Features, int, int], tuple[Entry, bytes]]


@dataclasses.dataclass(frozen=True)
class TfdsImage:
    """The image of a record. Each process that reads images opens the files once."""

    directory: str
    split: str
    index: int
    file_name: str
    exif: bool
    bits: ClassVar[int] = MOST_BITS

    @property
    def name(self) -> str:
        return f"{self.file_name} of {self.directory}"

    def read(self) -> bytes:
        try:
            return _bytes(_read(self.directory, self.split, self.index), "image")
        except RuntimeError as error:
            raise UnreadableImageError(f"{self.name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """The images of a split, with their file names."""

    directory: str
    split: str
    names: Sequence[str]
    exif: bool

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> TfdsImage:
        return TfdsImage(self.directory, self.split, int(index), self.names[index], self.exif)


def is_tfds(directory: Path, split: str) -> bool:
    """Whether the directory is that of one version of a TFDS data set, whatever its splits."""
    return (directory / INFO_FILE).is_file()


def find_below(directory: Path) -> Path | None:
    """The directory of a version in the folders below, where it is if the folder that `tfds.load` wants was given."""
    for pattern in ("*", "*/*", "*/*/*"):
        for file in directory.glob(f"{pattern}/{INFO_FILE}"):
            return file.parent
    return None


def load_tfds(directory: Path, split: str, classes: Classes | None = None, *, masks: bool = False) -> Dataset:
    """Reads the annotations of one split, for which it goes through all records.

    Args:
      directory: the directory of one version of the data set.
      split: name of the split, or of a part of one in TFDS's notation, like `train[:90%]`.
      classes: classes of the training split or a checkpoint, which the split's must be. None: the split's are taken. If
        the directory has no category ids, they are those of the same names in `classes`, or else the labels.
      masks: whether to read masks, which only records with the feature `coco` have.

    Raises:
      UserError: there is no such split, files are damaged or of another format, or features or classes are others.
    """
    builder, name = _builder(directory), f"{directory} (split {split!r})"
    source, features = _open(str(directory), split), builder.info.features
    metadata = builder.info.metadata or {}
    exact = COCO in features and COCO in metadata
    with without_garbage_collection():
        if exact:
            categories = metadata[COCO]["categories"]
            read_entry: ReadEntry = _exact_entry
        else:
            label_names = _check_features(features, directory)
            ids = ids_of_names(label_names, classes, range(len(label_names)))
            categories = [{"id": number, "name": label} for number, label in zip(ids, label_names)]
            read_entry = functools.partial(_plain_entry, ids=ids)
        scan = _Scan(str(directory), split, len(source), categories, read_entry)
        images = TfdsImages(str(directory), split, scan.names, exif=exact)
        parsed = parse_entries(scan, categories, name, images, classes, masks=masks)
    return Dataset(name, scan.digest.hexdigest(), *parsed, origin="TFDS")


class _Scan:
    """Goes through the records of a split once, and keeps the names and a digest of those that it has seen."""

    def __init__(
        self, directory: str, split: str, count: int, categories: Sequence[Mapping[str, Any]], read_entry: ReadEntry
    ):
        self.directory, self.split, self.count, self.read_entry = directory, split, count, read_entry
        self.names: list[str] = []
        self.objects = 0
        self.digest = hashlib.sha256(json.dumps(categories, sort_keys=True).encode())

    def __iter__(self) -> Iterator[Entry]:
        seen = set()
        for index in tqdm(range(self.count), desc="annotations", unit="image", leave=False, delay=2):
            try:
                features = _read(self.directory, self.split, index)
            except RuntimeError as error:
                raise UserError(
                    f"Record {index} of split {self.split!r} of {self.directory} cannot be read: {error}."
                ) from error
            try:
                (image, annotations), identity = self.read_entry(features, index, self.objects + 1)
                image_id, file_name = read_id(image, "id"), read_text(image, "file_name")
            except FieldError as error:
                raise UserError(f"Record {index} of split {self.split!r} of {self.directory} {error}.") from error
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"Record {index} of split {self.split!r} of {self.directory} is damaged: its features do not "
                    "fit together."
                ) from error
            if image_id in seen:
                raise UserError(f"Split {self.split!r} of {self.directory} lists image id {shown(image_id)} twice.")
            seen.add(image_id)
            self.objects += len(annotations)
            self.names.append(file_name)
            self.digest.update(identity + b"\n")
            yield image, annotations


def _exact_entry(features: Features, index: int, first_id: int) -> tuple[Entry, bytes]:
    """The COCO entry of a record that has the feature `coco`, and its identity."""
    text = _bytes(features, COCO)
    entry = json.loads(text)
    image, annotations = entry["image"], entry["annotations"]
    if not isinstance(image, dict) or not all(isinstance(annotation, dict) for annotation in annotations):
        raise FieldError("has a feature coco that holds no entries of COCO")
    return (image, annotations), text


def _plain_entry(features: Features, index: int, first_id: int, *, ids: Sequence[Id]) -> tuple[Entry, bytes]:
    """The COCO entry of a record that has TFDS's features alone, and its identity. Boxes refer to the image as it is stored,
    since TensorFlow ignores EXIF."""
    name = _bytes(features, "image/filename").decode() if "image/filename" in features else f"record {index}"
    numbers = _numbers(features, "image/id")
    image_id = int(numbers[0]) if len(numbers) else index + 1
    encoded = _bytes(features, "image")
    try:
        width, height = Image.open(io.BytesIO(encoded)).size
    except Exception:
        # Pillow raises errors of any type for damaged headers. The image gets an arbitrary size; it is left out, and named,
        # when it is to be decoded.
        width = height = 1
    relative = _numbers(features, "objects/bbox").reshape(-1, 4).astype(np.float64)
    top, left, bottom, right = (relative * [height, width, height, width]).T
    boxes = np.stack([left, top, right - left, bottom - top], axis=-1).tolist()
    crowds, areas = _numbers(features, "objects/is_crowd").tolist(), _numbers(features, "objects/area").tolist()
    annotations = []
    for number, (box, label) in enumerate(zip(boxes, _numbers(features, "objects/label").tolist())):
        annotation = {"id": first_id + number, "image_id": image_id, "bbox": box}
        if not 0 <= label < len(ids):
            raise FieldError(f"has an object with the label {label}, and there are {len(ids)} classes")
        annotation["category_id"] = ids[label]
        annotation["iscrowd"] = crowds[number] if crowds else 0
        if areas:
            annotation["area"] = areas[number]
        annotations.append(annotation)
    entry = {"id": image_id, "file_name": name, "width": width, "height": height}, annotations
    return entry, json.dumps(entry).encode()


def _check_features(features: Mapping[str, Any], directory: Path) -> list[str]:
    """The names of the classes, if the features are those of detection.

    Raises:
      UserError: they are not; the message says what detection wants.
    """
    import tensorflow_datasets as tfds

    def is_a(place: Mapping[str, Any], key: str, kind: type) -> bool:
        return key in place and isinstance(place[key], kind)

    fits = is_a(features, "image", tfds.features.Image) and is_a(features, "objects", tfds.features.Sequence)
    objects: Any = features["objects"].feature if fits else None
    fits = isinstance(objects, tfds.features.FeaturesDict) and is_a(objects, "bbox", tfds.features.BBoxFeature)
    if not fits or not is_a(objects, "label", tfds.features.ClassLabel):
        raise UserError(
            f"{directory} has the features {', '.join(features)}; detection wants image (Image) and objects, a Sequence of "
            "bbox (BBoxFeature) and label (ClassLabel), and may have image/id, image/filename, objects/is_crowd and "
            "objects/area."
        )
    form = objects["bbox"].bbox_format
    if form is not None and form.name != "REL_YXYX":
        raise UserError(f"The boxes of {directory} are {form.name}; detection wants TFDS's default, REL_YXYX.")
    return list(objects["label"].names)


@functools.lru_cache(maxsize=8)
def _builder(directory: Path) -> Any:
    """TFDS's builder of the version in a directory, which is to be in ArrayRecord files."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"The TFDS directory {directory} cannot be read: {str(error).splitlines()[0]}") from error
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{directory} is in {builder.info.file_format.value} files, which want TensorFlow; make ArrayRecord files of "
            f"them, where it is installed: tfds convert_format --dataset_version_dir={directory} "
            "--out_file_format=array_record --out_dir=DIR."
        )
    return builder


@functools.lru_cache(maxsize=8)
def _open(directory: str, split: str) -> Any:
    """The serialised records of a split, by their index."""
    import tensorflow_datasets as tfds

    builder = _builder(Path(directory))
    try:
        return builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except ValueError as error:
        known = ", ".join(builder.info.splits) or "none"
        raise UserError(
            f"{directory} has no split {split!r}; it has {known}. Set config.data.train_split and config.data.val_split."
        ) from error


def _read(directory: str, split: str, index: int) -> Features:
    """The features of a record. This is ten times faster than TFDS's own reader, which looks at each number.

    Raises:
      RuntimeError: the file is missing or damaged.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(_open(directory, split)[index]).features.feature


def _bytes(features: Features, key: str) -> bytes:
    return features[key].bytes_list.value[0]


def _numbers(features: Features, key: str) -> np.ndarray:
    """The numbers of a feature; none if there is no such feature."""
    if key not in features:
        return np.zeros(0)
    feature = features[key]
    return np.array(feature.int64_list.value or feature.float_list.value)
