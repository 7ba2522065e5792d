"""Writing of a COCO folder as a TFDS data set in ArrayRecord files, without TensorFlow.

The result is DATA_DIR/coco_folder/1.0.0 with the splits train and validation. Records have TFDS's features of detection, and
the annotations as they are in the COCO files, masks among them. Image files are copied byte by byte.
"""

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hpr_jax.data.dataset import Classes, Id
from hpr_jax.data.images import ImageFolder
from hpr_jax.data.sources.coco import file_names, group_annotations, load_coco, read_json
from hpr_jax.data.sources.coco_entries import Entry, box_or_bounds, clip_box
from hpr_jax.data.sources.coco_fields import read_area, read_crowd, read_id, read_side
from hpr_jax.data.sources.tfds import COCO
from hpr_jax.errors import UserError, shown

# Name and version of the data set that is written.
NAME, VERSION = "coco_folder", "1.0.0"
# A file of the result has about so many bytes of images.
SHARD = 2**28


def make_tfds(settings: Mapping[str, Any], target: Path) -> Path:
    """Writes a data set.

    Args:
      settings: section `data` of a config, with the COCO folder and the names in it.
      target: folder in which TFDS data sets are kept.

    Returns:
      The directory of the version that was written.

    Raises:
      UserError: the folder is no COCO data set, image files are missing, or the data set is there already.
    """
    source, directory = Path(settings["directory"]).expanduser(), target / NAME / VERSION
    if directory.exists():
        raise UserError(f"{directory} exists; delete it, or choose another folder.")
    train = _Split(source, settings["train_images"], settings["train_annotations"], None)
    val = _Split(source, settings["val_images"], settings["val_annotations"], train.classes)
    target.mkdir(parents=True, exist_ok=True)
    # Imported before Ctrl-C raises an error, which must not happen while libraries are imported.
    import tensorflow_datasets  # noqa: F401

    # What loads data, and imports this file, does without the wing runtime.
    from hpr_jax.runtime.console import interruptible

    # Written elsewhere and moved when it is complete, so that nothing is left of a conversion that is stopped.
    with interruptible(), tempfile.TemporaryDirectory(dir=target, prefix=f"{NAME}.") as work:
        _write({"train": train, "validation": val}, Path(work))
        (target / NAME).mkdir(exist_ok=True)
        (Path(work) / NAME / VERSION).rename(directory)
    return directory


class _Split:
    """A split of the COCO folder. All of its image files are there."""

    def __init__(self, source: Path, images: str, annotations: str, classes: Classes | None):
        dataset = load_coco(source, images, annotations, classes)
        path = source / annotations
        content = read_json(path)
        self.classes, self.categories = dataset.classes, content["categories"]
        self.entries = group_annotations(content, path)
        # Checked, since the files are copied: no name leads out of the folder.
        names = file_names(self.entries, str(path), source / images, source)
        self.files = [image.path for image in ImageFolder(source / images, names)]
        missing = [file for file in self.files if not file.is_file()]
        if missing:
            raise UserError(f"{len(missing)} of {len(self.files)} images of {path} are missing, like {missing[0]}.")

    def shards(self, split: str) -> list[Callable[[], Iterator[tuple[int, dict]]]]:
        """Functions that make the numbered TFDS examples, one for each file of the result."""
        count = max(1, round(sum(file.stat().st_size for file in self.files) / SHARD))
        bounds = [len(self.files) * number // count for number in range(count + 1)]
        return [functools.partial(self._examples, split, start, stop) for start, stop in zip(bounds, bounds[1:])]

    def _examples(self, split: str, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        for index in tqdm(range(start, stop), desc=f"{split}, images {start} to {stop}", unit="image", leave=False):
            yield index, _example(index, self.entries[index], self.files[index], self.classes.category_ids)


def _example(index: int, entry: Entry, file: Path, category_ids: Sequence[Id]) -> dict[str, Any]:
    """The features of a record."""
    image, annotations = entry
    image_id, width, height = read_id(image, "id"), read_side(image, "width"), read_side(image, "height")
    objects = []
    for number, annotation in enumerate(annotations):
        xywh, _ = box_or_bounds(annotation, height, width)
        box = clip_box(xywh, width, height)[0] if xywh is not None else ()
        if xywh is None or not box:
            # TFDS has no such boxes. The feature `coco` keeps it.
            continue
        left, top, right, bottom = box
        own_id = annotation.get("id")
        objects.append(
            {
                "id": own_id if _fits(own_id) else number,
                "bbox": np.array([top / height, left / width, bottom / height, right / width]),
                "label": category_ids.index(read_id(annotation, "category_id")),
                "is_crowd": read_crowd(annotation),
                "area": read_area(annotation, xywh[2] * xywh[3], width * height),
            }
        )
    try:
        entries = json.dumps({"image": image, "annotations": annotations})
    except RecursionError as error:
        raise UserError(f"The entries of image {shown(image_id)} are nested too deeply.") from error
    return {
        "image": str(file),
        "image/id": image_id if _fits(image_id) else index,
        "image/filename": str(image["file_name"]),
        "objects": objects,
        COCO: entries,
    }


def _fits(identity: Any) -> bool:
    """Whether an id fits TFDS's feature for it, a whole number of 64 bits. The feature `coco` keeps others."""
    return isinstance(identity, int) and not isinstance(identity, bool) and -(2**63) <= identity < 2**63


def _write(splits: Mapping[str, _Split], target: Path) -> None:
    """Has TFDS write the splits."""
    import tensorflow_datasets as tfds

    classes, categories = splits["train"].classes, splits["train"].categories
    labels = [
        name if classes.names.count(name) == 1 else f"{name} ({number})"
        for name, number in zip(classes.names, classes.category_ids)
    ]
    features = {
        "image": tfds.features.Image(),
        "image/id": tfds.features.Scalar(np.int64),
        "image/filename": tfds.features.Text(),
        "objects": tfds.features.Sequence(
            {
                "id": tfds.features.Scalar(np.int64),
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(names=labels),
                "is_crowd": tfds.features.Scalar(np.bool_),
                "area": tfds.features.Scalar(np.float32),
            }
        ),
        COCO: tfds.features.Text(),
    }

    # TFDS comes without types, so mypy takes the base class for `object`, which knows no `skip_registration`.
    class Folder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """A builder that keeps the order of the images."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        # TFDS would look for checksums of downloads beside the builder's code, with a package that it does not install.
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="A data set in COCO form. `coco` is an image's entry with its annotations, as JSON.",
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict({COCO: {"categories": categories}}),
                disable_shuffling=True,
            )

        def _shard_iterators_per_split(self, dl_manager):
            return {name: split.shards(name) for name, split in splits.items()}

    # TFDS prints messages about downloads, of which there are none.
    with contextlib.redirect_stdout(io.StringIO()):
        Folder(data_dir=target, file_format="array_record").download_and_prepare()
