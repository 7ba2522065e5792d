"""Data as it was recognised in a folder: what reads its splits, and how images are split where the data does not say."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hpr_jax.data.dataset import Classes, Dataset
from hpr_jax.data.sources.coco import Content, load_content, without_garbage_collection
from hpr_jax.data.sources.coco_entries import Entry
from hpr_jax.errors import UserError

# The words by which folders and files name the splits, the ones that are preferred first.
TRAINING = ("train", "training", "trainval")
VALIDATION = ("val", "valid", "validation", "dev", "test", "testing")
# The words for splits that have no images of `trainval`. Validating on one of them is said.
_TEST = ("test", "testing")
# What Roboflow puts behind the name of an image, in the names of its augmented copies.
_COPY = re.compile(r"\.rf\.[0-9A-Za-z]+(?=\.\w+$)")

# Reads a split. Formats without category ids take those of the same names in the classes.
ReadSplit = Callable[[Classes | None], Content]
Split = TypeVar("Split")


@dataclasses.dataclass(frozen=True)
class Source:
    """Data that was recognised in a folder.

    Attributes:
      directory: the folder, which no name in the annotations leads out of.
      format: the name of the format.
      splits: what reads "train" and "val", or one of them.
      note: what else there is to say of the splits, as the end of the sentence that begins with the format.
    """

    directory: Path
    format: str
    splits: Mapping[str, ReadSplit]
    note: str = ""

    def load(self, split: str, val_fraction: float, classes: Classes | None, *, masks: bool) -> Dataset:
        """Reads the split "train" or "val". If there is only "train", both are parts of it.

        Args:
          val_fraction: the part of the images that is "val" if the data has one split.
          classes, masks: as in `load_coco`.

        Raises:
          UserError: there is no such split, or its annotations are not as they should be.
        """
        origin = self.format + self.note
        with without_garbage_collection():
            if "val" not in self.splits:
                content = take_part(self.splits["train"](classes), split, val_fraction)
                origin += f", split by config.data.val_fraction={val_fraction}"
            elif split in self.splits:
                content = self.splits[split](classes)
            else:
                raise UserError(
                    f"{self.directory} is read as {origin}, and has no training split, only one for validation; name it "
                    f"{TRAINING[0]} if it is to be trained on."
                )
            return load_content(content, self.directory, classes, masks=masks, origin=origin)


def choose_splits(found: Mapping[str, Split]) -> tuple[dict[str, Split], str]:
    """Which of the splits that were found, by the words that name them, are trained on and validated on.

    Returns:
      The splits "train" and "val", as far as there are any, and the `note` of `Source`. A split `trainval` has the images of
      a split `val`, which is then not validated on, and a split `test` is, if there is no other.
    """
    train = next((word for word in TRAINING if word in found), None)
    words = _TEST if train == "trainval" else VALIDATION
    val = next((word for word in words if word in found), None)
    chosen = {split: found[word] for split, word in (("train", train), ("val", val)) if word is not None}
    return chosen, f", with {val} for validation" if val in _TEST else ""


def take_part(content: Content, split: str, val_fraction: float) -> Content:
    """The part "train" or "val" of images that are not split.

    Raises:
      UserError: there are too few images.
    """
    chosen = validates([str(image.get("file_name")) for image, _ in content.entries], val_fraction)
    if not any(chosen) or all(chosen):
        raise UserError(
            f"{content.name} has {len(chosen)} images, too few for one to train on and another to validate on; add images."
        )
    entries: list[Entry] = [entry for entry, val in zip(content.entries, chosen) if val == (split == "val")]
    part = "validation" if split == "val" else "training"
    return Content.make(f"{content.name} ({part} part)", content.folder, content.categories, entries)


def validates(names: Sequence[str], val_fraction: float) -> list[bool]:
    """Which images are validated on, by a hash of their file names: nothing depends on their order, and an image stays where
    it is when others are added or taken away.

    About `val_fraction` of the images are, and at least one is and one is not, if there are two. Copies that Roboflow has
    made of an image stay together: to know one from training would help with another in validation.
    """
    places = [_place(_COPY.sub("", name.replace("\\", "/"))) for name in names]
    least, most = min(places, default=0.0), max(places, default=0.0)
    return [place == least or (place < val_fraction and place != most) for place in places]


def _place(name: str) -> float:
    """A number from 0 to below 1 that follows from a name, evenly distributed."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:6]) / 2**48


def describe(directory: Path, train: Dataset | None, val: Dataset | None) -> str:
    """What a folder is read as, with the splits of it that were read, for the log."""
    read = {word: dataset for word, dataset in (("training", train), ("validation", val)) if dataset is not None}
    images = " and ".join(f"{len(dataset):,} {word}" for word, dataset in read.items())
    first = next(iter(read.values()))
    classes = len(first.classes.names)
    return f"{directory} is read as {first.origin}: {images} images, {classes:,} {'class' if classes == 1 else 'classes'}"
