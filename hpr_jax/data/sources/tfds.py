"""Data sets of TensorFlow Datasets (https://www.tensorflow.org/datasets), in ArrayRecord files, without TensorFlow.

Records have the features of TFDS's own detection data sets: `image`, and `objects` with `bbox` and `label`. Those that
`scripts/make_tfds` writes have one more, `coco`, an image's entry and annotations as in the COCO file: it is used in place
of the others, with masks, and nothing is rounded.
"""

import dataclasses
import functools
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from hpr_jax.data.dataset import Classes, Dataset
from hpr_jax.data.images import EncodedImage, UnreadableImageError
from hpr_jax.data.sources.coco import Entry, named_errors, no_collection, parse_entries
from hpr_jax.errors import UserError

# Of each record, JSON: {"image": entry, "annotations": [entry, ...]}; of the data set, in its metadata: {"categories": ...}.
COCO = "coco"

Features = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TfdsImage:
    """The image of a record; the files are opened once in each process that reads."""

    directory: str
    split: str
    index: int
    file_name: str
    exif: bool

    @property
    def name(self) -> str:
        return f"{self.file_name} of {self.directory}"

    def read(self) -> bytes:
        try:
            return _bytes(_read(self.directory, self.split, self.index), "image")
        except RuntimeError as error:
            raise UnreadableImageError(f"{self.name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class TfdsImages(Sequence[EncodedImage]):
    """The images of a split, by their names."""

    directory: str
    split: str
    names: Sequence[str]
    exif: bool

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> TfdsImage:
        return TfdsImage(self.directory, self.split, int(index), self.names[index], self.exif)


def load_tfds(directory: Path, split: str, classes: Classes | None = None, *, masks: bool = False) -> Dataset:
    """Reads the annotations of one split, for which it goes through all records.

    Args:
      directory: that of one version, with `dataset_info.json`.
      split: its name, or a part of it as TFDS writes it, like `train[:90%]`.
      classes, masks: as for `load_coco`. Where the directory knows names of classes alone, their category
        ids are those of `classes`, else the labels' numbers.

    Raises:
      UserError: no such split, files of another format, other features, damaged files, or other classes.
    """
    builder, name = _builder(directory), f"{directory} (split {split!r})"
    source, features = _open(str(directory), split), builder.info.features
    exact = COCO in features and COCO in (builder.info.metadata or {})
    with no_collection(), named_errors(name):
        if exact:
            categories = builder.info.metadata[COCO]["categories"]
            read_entry = _exact_entry
        else:
            label_names = _check_features(features, directory)
            ids = _category_ids(label_names, classes)
            categories = [{"id": number, "name": label} for number, label in zip(ids, label_names)]
            read_entry = functools.partial(_plain_entry, ids=ids)
        scan = _Scan(str(directory), split, len(source), categories, read_entry)
        images = TfdsImages(str(directory), split, scan.names, exif=exact)
        parsed = parse_entries(scan, categories, name, images, classes, masks=masks)
    truth = functools.partial(_ground_truth, categories, scan.packed())
    return Dataset(name, scan.digest.hexdigest(), truth, *parsed)


class _Scan:
    """Goes through a split's records once; keeps names, ground truth and fingerprint of what it has seen."""

    def __init__(self, directory: str, split: str, count: int, categories: Sequence[Mapping[str, Any]], read_entry):
        self.directory, self.split, self.count, self.read_entry = directory, split, count, read_entry
        self.names: list[str] = []
        self.objects = 0
        self.digest = hashlib.sha256(json.dumps(categories, sort_keys=True).encode())
        self._packer, self._packed = zlib.compressobj(1), bytearray()

    def __iter__(self) -> Iterator[Entry]:
        seen = set()
        for index in tqdm(range(self.count), desc="annotations", unit="image", leave=False, delay=2):
            try:
                features = _read(self.directory, self.split, index)
            except RuntimeError as error:
                raise UserError(
                    f"Record {index} of split {self.split!r} of {self.directory} cannot be read: {error}."
                ) from error
            (image, annotations), identity = self.read_entry(features, index, self.objects + 1)
            if image["id"] in seen:
                raise UserError(f"Split {self.split!r} of {self.directory} lists image id {image['id']} twice.")
            seen.add(image["id"])
            self.objects += len(annotations)
            self.names.append(str(image["file_name"]))
            self.digest.update(identity + b"\n")
            # Box evaluation has no use for masks, which are the most of it.
            boxes = [{key: value for key, value in a.items() if key != "segmentation"} for a in annotations]
            self._packed += self._packer.compress(json.dumps([image, boxes]).encode() + b"\n")
            yield image, annotations

    def packed(self) -> bytes:
        """The ground truth, compressed: a line of JSON for each image, with its entry and its annotations."""
        return bytes(self._packed + self._packer.flush())


def _ground_truth(categories: Sequence[Mapping[str, Any]], packed: bytes) -> dict[str, Any]:
    entries = [json.loads(line) for line in zlib.decompress(packed).splitlines()]
    annotations = [annotation for _, annotations in entries for annotation in annotations]
    return {"images": [image for image, _ in entries], "annotations": annotations, "categories": list(categories)}


def _exact_entry(features: Features, index: int, first_id: int) -> tuple[Entry, bytes]:
    text = _bytes(features, COCO)
    entry = json.loads(text)
    return (entry["image"], entry["annotations"]), text


def _plain_entry(features: Features, index: int, first_id: int, *, ids: Sequence[int]) -> tuple[Entry, bytes]:
    """A COCO entry of a record with TFDS's features alone. Boxes refer to the image as stored: TensorFlow ignores EXIF."""
    name = _bytes(features, "image/filename").decode() if "image/filename" in features else f"record {index}"
    numbers = _numbers(features, "image/id")
    image_id = int(numbers[0]) if len(numbers) else index + 1
    try:
        width, height = Image.open(io.BytesIO(_bytes(features, "image"))).size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError):
        # Known by name, and left out where it is to be decoded.
        width = height = 1
    relative = _numbers(features, "objects/bbox").reshape(-1, 4).astype(np.float64)
    top, left, bottom, right = (relative * [height, width, height, width]).T
    boxes = np.stack([left, top, right - left, bottom - top], axis=-1).tolist()
    crowds, areas = _numbers(features, "objects/is_crowd").tolist(), _numbers(features, "objects/area").tolist()
    annotations = []
    for number, (box, label) in enumerate(zip(boxes, _numbers(features, "objects/label").tolist())):
        annotation = {"id": first_id + number, "image_id": image_id, "bbox": box}
        annotation["category_id"] = ids[label] if 0 <= label < len(ids) else f"with label {label}"
        annotation["iscrowd"] = crowds[number] if crowds else 0
        if areas:
            annotation["area"] = areas[number]
        annotations.append(annotation)
    entry = {"id": image_id, "file_name": name, "width": width, "height": height}, annotations
    return entry, json.dumps(entry).encode()


def _check_features(features: Mapping[str, Any], directory: Path) -> list[str]:
    """The names of the labels, if the features are those of detection.

    Raises:
      UserError: says what is wanted.
    """
    import tensorflow_datasets as tfds

    def is_a(place: Mapping[str, Any], key: str, kind: type) -> bool:
        return key in place and isinstance(place[key], kind)

    fits = is_a(features, "image", tfds.features.Image) and is_a(features, "objects", tfds.features.Sequence)
    objects = features["objects"].feature if fits else None
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


def _category_ids(names: Sequence[str], classes: Classes | None) -> list[int]:
    if classes is not None and len(set(names)) == len(names) and sorted(names) == sorted(classes.names):
        return [dict(zip(classes.names, classes.category_ids))[name] for name in names]
    return list(range(len(names)))


@functools.lru_cache(maxsize=8)
def _builder(directory: Path):
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
def _open(directory: str, split: str):
    """The serialised records of a split."""
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
    """A record's features, by their names; ten times faster than TFDS's own reader, which looks at each number.

    Raises:
      RuntimeError: the file is missing or damaged.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(_open(directory, split)[index]).features.feature


def _bytes(features: Features, key: str) -> bytes:
    return features[key].bytes_list.value[0]


def _numbers(features: Features, key: str) -> np.ndarray:
    if key not in features:
        return np.zeros(0)
    feature = features[key]
    return np.array(feature.int64_list.value or feature.float_list.value)
