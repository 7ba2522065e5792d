"""A data set as training and evaluation know it, whatever form it is stored in."""

import dataclasses
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from hpr_jax.data.images import EncodedImage, EncodedImages
from hpr_jax.data.masks import Mask, PackedMasks
from hpr_jax.errors import shown

# The id of an image or a category, which files may write as a number or as text.
Id = int | str


def id_order(identity: Id) -> tuple[bool, Id]:
    """The key by which ids are sorted: numbers before texts."""
    return isinstance(identity, str), identity


@dataclasses.dataclass(frozen=True)
class ImageAnnotations:
    """What is annotated of one image. Crowds are no objects.

    Attributes:
      image_id: id of the image in the annotations.
      height, width: annotated size of the image, in pixels.
      boxes: boxes of the objects, float32 xyxy `[n, 4]` in pixels, clipped to the image.
      labels: classes of the objects, int32 `[n]`, indices into the data set's classes.
      masks: masks of the objects, None for those without; () if masks were not read.
      crowds: masks of the crowds; () if masks were not read.
    """

    image_id: Id
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    masks: tuple[Mask | None, ...] = ()
    crowds: tuple[Mask, ...] = ()


@dataclasses.dataclass(frozen=True)
class Record(ImageAnnotations):
    """An image with its annotations."""

    image: EncodedImage = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split, packed into a few arrays and made anew when asked for.

    As separate objects, the million small arrays of a large data set would take a gigabyte, and sending them to another
    process half a minute.

    Attributes:
      images: the images, `M` of them.
      image_ids: their ids.
      sizes: (height, width) of the images, int64 `[M, 2]`.
      starts: where the objects of each image begin in `boxes`, `labels` and `masks`, int64 `[M + 1]`.
      boxes: boxes of all objects, float32 `[n, 4]`.
      labels: labels of all objects, int32 `[n]`.
      masks: masks of all objects; None if masks were not read.
      crowd_starts: where the crowds of each image begin in `crowds`, int64 `[M + 1]`.
      crowds: masks of all crowds.
      order: the images that are taken, in their order, as indices: int64 `[K]`.
    """

    images: EncodedImages
    image_ids: tuple[Id, ...]
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

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Record:
        place = self.order[index]
        height, width = self.sizes[place].tolist()
        objects = slice(self.starts[place], self.starts[place + 1])
        crowds = self.crowds.between(self.crowd_starts[place], self.crowd_starts[place + 1])
        return Record(
            image_id=self.image_ids[place],
            image=self.images[place],
            height=height,
            width=width,
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            masks=() if self.masks is None else self.masks.between(objects.start, objects.stop),
            crowds=tuple(mask for mask in crowds if mask is not None),
        )

    @property
    def counts(self) -> np.ndarray:
        """Number of objects of each record: int64 `[K]`."""
        return np.diff(self.starts)[self.order]

    def objects(self) -> tuple[np.ndarray, np.ndarray]:
        """Record and class of each object: int64 and int32 `[n]`."""
        starts, ends = self.starts[self.order], self.starts[self.order + 1]
        labels = [self.labels[start:end] for start, end in zip(starts, ends)]
        return np.repeat(np.arange(len(self)), self.counts), np.concatenate([np.zeros(0, np.int32), *labels])

    def count_masks(self) -> int:
        """Number of objects that have a mask."""
        if self.masks is None:
            return 0
        present = np.concatenate([[0], np.cumsum(self.masks.present())])
        return int((present[self.starts[self.order + 1]] - present[self.starts[self.order]]).sum())

    def take(self, which: np.ndarray) -> "Records":
        """Some of the records: indices, or bool `[K]`."""
        return dataclasses.replace(self, order=self.order[which])

    @classmethod
    def pack(cls, annotations: Iterable[ImageAnnotations], images: EncodedImages, *, with_masks: bool = False) -> "Records":
        """Packs the annotations of all images of a split.

        Args:
          images: their images; reading `annotations` may be what fills it.
          with_masks: whether the annotations have masks.
        """
        ids, sizes, counts, crowd_counts = [], [], [], []
        boxes, labels, masks, crowds = bytearray(), bytearray(), PackedMasks.Packer(), PackedMasks.Packer()
        for one in annotations:
            ids.append(one.image_id)
            sizes.append((one.height, one.width))
            counts.append(len(one.boxes))
            crowd_counts.append(len(one.crowds))
            boxes += one.boxes.tobytes()
            labels += one.labels.tobytes()
            masks.extend(one.masks)
            crowds.extend(one.crowds)
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
    """The classes of a data set, in the order of their labels. Category ids may have gaps, and may be text."""

    names: tuple[str, ...]
    category_ids: tuple[Id, ...]

    def as_set(self) -> set[tuple[Id, str]]:
        """Pairs of category id and name, to compare classes whatever their order."""
        return set(zip(self.category_ids, self.names))


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """What evaluators compare detections with: all annotations of a split whose box is four finite numbers, as annotated.
    Crowds are among them, and boxes that training leaves out, as too small or outside their image.

    Attributes:
      images: image of each annotation, as its place in the split's records: int64 `[n]`.
      labels: class of each, int32 `[n]`.
      boxes: boxes as (left, top, width, height) in pixels, not clipped: float64 `[n, 4]`.
      areas: areas in square pixels, by which objects are small, medium or large: float64 `[n]`.
      crowd: which are crowds, bool `[n]`.
      repeated_ids: number of annotations whose id another one had before.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    repeated_ids: int = 0

    class Packer:
        """Packs the annotations image by image."""

        def __init__(self) -> None:
            self.image = -1
            self.images, self.labels, self.crowd = array("q"), array("i"), array("b")
            self.boxes, self.areas = array("d"), array("d")
            self.ids: set[Id] = set()

        def begin_image(self) -> None:
            """What is added from now on belongs to the next image."""
            self.image += 1

        def add(self, label: int, box: Sequence[float], area: float, crowd: bool, own_id: Any = None) -> None:
            """Adds an annotation; its id may be anything."""
            self.images.append(self.image)
            self.labels.append(label)
            self.boxes.extend(box)
            self.areas.append(area)
            self.crowd.append(crowd)
            self.ids.add(own_id if isinstance(own_id, int | str) else shown(own_id))

        def finish(self) -> "GroundTruth":
            """All annotations that were added."""
            return GroundTruth(
                images=np.array(self.images, np.int64),
                labels=np.array(self.labels, np.int32),
                boxes=np.array(self.boxes, np.float64).reshape(-1, 4),
                areas=np.array(self.areas, np.float64),
                crowd=np.array(self.crowd, bool),
                repeated_ids=len(self.images) - len(self.ids),
            )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A box or mask that is left out because it is impossible; as a string, a sentence.

    Attributes:
      subject: names the annotation and what of it is impossible.
      reason: says why, and completes the sentence.
    """

    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.subject} {self.reason}"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split of a data set.

    Attributes:
      name: the name that messages give the split.
      fingerprint: SHA-256 of everything but the pixels that training and evaluation depend on: ids, names and sizes of the
        images, annotations, categories.
      classes: the classes that the labels refer to.
      records: the images with their annotations.
      truth: what evaluators compare detections with; None if only a part of the images is taken.
      dropped_boxes: objects that are left out because their box is impossible.
      dropped_masks: masks that are left out because they are impossible; the objects stay.
      origin: what the data was recognised as, for messages: its format, and how it was split if the data does not say.
    """

    name: str
    fingerprint: str
    classes: Classes
    records: Records
    truth: "GroundTruth | None"
    dropped_boxes: tuple[Problem, ...] = ()
    dropped_masks: tuple[Problem, ...] = ()
    origin: str = "COCO"

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sizes(self) -> np.ndarray:
        """(height, width) of every image that is taken: int64 `[K, 2]`."""
        return self.records.sizes[self.records.order]

    def count_masks(self) -> tuple[int, int]:
        """How many objects have a mask, and how many objects there are."""
        return self.records.count_masks(), int(self.records.counts.sum())

    def subset(self, *, keep_empty: bool, min_side: int) -> "Dataset":
        """The same without images whose shorter side is below `min_side` pixels, and, unless `keep_empty`, without images
        that have no object. It can be trained on, and not be evaluated on."""
        keep = self.sizes.min(axis=1) >= min_side
        if not keep_empty:
            keep &= self.records.counts > 0
        return dataclasses.replace(self, records=self.records.take(keep), truth=None)

    def first(self, count: int) -> "Dataset":
        """The first images of a whole split, as a split of their own, which can be evaluated on."""
        records, truth = self.records, self.truth
        if truth is None:
            raise ValueError(f"Only a part of {self.name} is taken, which has no ground truth of its own.")
        count = min(count, len(records))
        records = dataclasses.replace(
            records, image_ids=records.image_ids[:count], sizes=records.sizes[:count], order=np.arange(count)
        )
        kept = truth.images < count
        arrays = ("images", "labels", "boxes", "areas", "crowd")
        truth = dataclasses.replace(truth, **{name: getattr(truth, name)[kept] for name in arrays})
        return dataclasses.replace(self, records=records, truth=truth)
