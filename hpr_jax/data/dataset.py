"""What training and evaluation know of a data set, whatever its source."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from hpr_jax.data.images import EncodedImage
from hpr_jax.data.masks import Mask, PackedMasks


@dataclasses.dataclass(frozen=True)
class Record:
    """One image and its objects.

    Attributes:
      image_id: as in the annotations.
      image: knows its name, and reads its bytes.
      height, width: in pixels, as annotated.
      boxes: float32 xyxy `[n, 4]` in pixels, clipped to the image; crowds left out.
      labels: int32 `[n]`, indices into the data set's classes.
      masks: of the objects, None for those without; () where masks were not read.
      crowds: masks of the crowds, where masks were read.
    """

    image_id: int
    image: EncodedImage
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    masks: tuple[Mask | None, ...] = ()
    crowds: tuple[Mask, ...] = ()


@dataclasses.dataclass(frozen=True)
class Records(Sequence[Record]):
    """Records, kept in a few arrays: a million small ones take a gigabyte, and half a minute to reach another process.

    Attributes:
      images: of all records, in order.
      image_ids: likewise.
      sizes: (height, width), int64 `[M, 2]`.
      starts: where the objects of each record begin, int64 `[M + 1]`.
      boxes, labels: of all objects.
      masks: of all objects, None where masks were not read.
      crowd_starts, crowds: like `starts` and `masks`.
      order: the records that are taken, and in which order: int64 `[K]`.
    """

    images: Sequence[EncodedImage]
    image_ids: tuple[int, ...]
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: PackedMasks | None
    crowd_starts: np.ndarray
    crowds: PackedMasks
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Record:
        place = self.order[index]
        height, width = self.sizes[place].tolist()
        objects = slice(self.starts[place], self.starts[place + 1])
        return Record(
            image_id=self.image_ids[place],
            image=self.images[place],
            height=height,
            width=width,
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            masks=() if self.masks is None else self.masks.between(objects.start, objects.stop),
            crowds=self.crowds.between(self.crowd_starts[place], self.crowd_starts[place + 1]),
        )

    @property
    def counts(self) -> np.ndarray:
        """Objects of each record: int64 `[K]`."""
        return np.diff(self.starts)[self.order]

    def count_masks(self) -> int:
        """Objects that have a mask."""
        if self.masks is None:
            return 0
        present = np.concatenate([[0], np.cumsum(self.masks.present())])
        return int((present[self.starts[self.order + 1]] - present[self.starts[self.order]]).sum())

    def take(self, which: np.ndarray) -> "Records":
        """Some of the records: indices, or bool `[K]`."""
        return dataclasses.replace(self, order=self.order[which])

    @classmethod
    def pack(cls, records: Iterable[Record], images: Sequence[EncodedImage], *, with_masks: bool = False) -> "Records":
        """Keeps all of the records but their images, which `images` gives instead; it may be filled meanwhile."""
        ids, sizes, counts, crowd_counts = [], [], [], []
        boxes, labels, masks, crowds = bytearray(), bytearray(), PackedMasks.Packer(), PackedMasks.Packer()
        for record in records:
            ids.append(record.image_id)
            sizes.append((record.height, record.width))
            counts.append(len(record.boxes))
            crowd_counts.append(len(record.crowds))
            boxes += record.boxes.tobytes()
            labels += record.labels.tobytes()
            masks.extend(record.masks)
            crowds.extend(record.crowds)
        return cls(
            images=images,
            image_ids=tuple(ids),
            sizes=np.array(sizes, np.int64).reshape(-1, 2),
            starts=np.cumsum([0, *counts]),
            boxes=np.frombuffer(bytes(boxes), np.float32).reshape(-1, 4),
            labels=np.frombuffer(bytes(labels), np.int32),
            masks=masks.finish() if with_masks else None,
            crowd_starts=np.cumsum([0, *crowd_counts]),
            crowds=crowds.finish(),
            order=np.arange(len(ids)),
        )


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their labels; category ids may have gaps."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def as_set(self) -> set[tuple[int, str]]:
        """Category ids and names, whatever their order."""
        return set(zip(self.category_ids, self.names))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something in the annotations that cannot be, and is left out; reads as a sentence."""

    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject} {self.reason}"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split of a data set.

    Attributes:
      name: for messages.
      fingerprint: SHA-256 of all that decides training and evaluation but the pixels: ids, names and sizes of the images,
        annotations, categories.
      ground_truth: reads all annotations in COCO form, for an evaluator: crowds and impossible boxes, too; masks or not.
      dropped: boxes that cannot be.
      unmasked: masks that cannot be.
    """

    name: str
    fingerprint: str
    ground_truth: Callable[[], dict[str, Any]]
    classes: Classes
    records: Records
    dropped: tuple[Problem, ...] = ()
    unmasked: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sizes(self) -> np.ndarray:
        """(height, width) of every image: int64 `[M, 2]`."""
        return self.records.sizes[self.records.order]

    def count_masks(self) -> tuple[int, int]:
        """How many objects have a mask, and how many there are."""
        return self.records.count_masks(), int(self.records.counts.sum())

    def subset(self, *, keep_empty: bool, min_side: int) -> "Dataset":
        """Without images whose shorter side is below `min_side`, and without those that have no object unless kept."""
        keep = self.sizes.min(axis=1) >= min_side
        if not keep_empty:
            keep &= self.records.counts > 0
        return dataclasses.replace(self, records=self.records.take(keep))
