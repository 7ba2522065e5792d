"""Facts about a data set: counts, spreads, faults, copies of images, what splits have in common, the plan of an epoch."""

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hpr_jax.data.dataset import Dataset, GroundTruth, Problem, Record
from hpr_jax.data.decoding import bits_if_dark
from hpr_jax.data.images import OtherSizeError, UnreadableImageError, decode_annotated
from hpr_jax.data.loading.batch_plan import Shape, TrainPlan
from hpr_jax.data.sources.coco_entries import clip_box

# COCO's small boxes have areas below SMALL, its medium ones below MEDIUM, in square pixels.
SMALL, MEDIUM = 32**2, 96**2

# What can be wrong with the file of an image.
MISSING, UNREADABLE, OTHER_SIZE = "missing", "unreadable", "of another size"


@dataclasses.dataclass(frozen=True)
class Spread:
    """The least, the median and the most of some numbers."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, numbers: np.ndarray) -> "Spread":
        """The spread of numbers `[n]`, zeros if there are none."""
        if not len(numbers):
            return cls(0.0, 0.0, 0.0)
        return cls(float(numbers.min()), float(np.median(numbers)), float(numbers.max()))


@dataclasses.dataclass(frozen=True)
class BoxFacts:
    """Sizes of the boxes of a split, in pixels. Boxes that were dropped do not count.

    Attributes:
      small, medium, large: number of boxes in each of COCO's ranges of areas.
      widths, heights: spreads over all boxes.
      clipped: number of boxes that reach beyond their image and were clipped to it.
      beyond: by how many whole pixels they did.
    """

    small: int
    medium: int
    large: int
    widths: Spread
    heights: Spread
    clipped: int
    beyond: Spread


@dataclasses.dataclass(frozen=True)
class AnnotationFacts:
    """What is annotated in a split.

    Attributes:
      images: number of images.
      empty: number of images without objects.
      objects, crowds: their numbers.
      objects_per_image: spread over the images.
      fullest: name of an image with the most objects, "" if there are no images.
      widths, heights: spreads over the images, in pixels.
      boxes: sizes of the boxes.
      class_counts: number of objects of each class, in the order of the labels.
      absent: names of the classes without objects.
      repeated_ids: number of annotations whose id another one had before.
      file_names: names of the image files.
      repeated_names: those that are listed more than once.
    """

    images: int
    empty: int
    objects: int
    crowds: int
    objects_per_image: Spread
    fullest: str
    widths: Spread
    heights: Spread
    boxes: BoxFacts
    class_counts: tuple[int, ...]
    absent: tuple[str, ...]
    repeated_ids: int
    file_names: frozenset[str]
    repeated_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OpenedImage:
    """What opening an image has shown.

    Attributes:
      name: the name that messages give the image.
      digest: SHA-256 of its file; "" if there is no image of the annotated size.
      failure: `MISSING`, `UNREADABLE` or `OTHER_SIZE`; "" if nothing is wrong.
      sentence: says what is wrong.
      dark_bits: number of bits that its samples take, if they are stored in 16 and the image is dark; else 0.
    """

    name: str
    digest: str
    failure: str = ""
    sentence: str = ""
    dark_bits: int = 0


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What the training split and the validation split have in common.

    Attributes:
      names: file names that are in both.
      images: names of validation images whose file is, byte by byte, that of a training image.
    """

    names: tuple[str, ...]
    images: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """An epoch of training.

    Attributes:
      images_per_step: number of images in a batch.
      steps: number of steps.
      batches: number of batches in each padded shape, smallest shape first.
      padding: pixels that padding adds, as a fraction of those of the images.
    """

    images_per_step: int
    steps: int
    batches: Mapping[Shape, int]
    padding: float


def annotation_facts(dataset: Dataset) -> AnnotationFacts:
    """What is annotated in a whole split."""
    counts, truth = dataset.records.counts, dataset.truth
    if truth is None:
        raise ValueError(f"Only a part of {dataset.name} is taken.")
    classes = dataset.classes.names
    class_counts = tuple(np.bincount(dataset.records.labels, minlength=len(classes)).tolist())
    names = collections.Counter(dataset.records.images.names)
    return AnnotationFacts(
        images=len(dataset),
        empty=int(np.sum(counts == 0)),
        objects=int(counts.sum()),
        crowds=int(truth.crowd.sum()),
        objects_per_image=Spread.of(counts),
        fullest=dataset.records[int(np.argmax(counts))].image.name if len(dataset) else "",
        widths=Spread.of(dataset.sizes[:, 1]),
        heights=Spread.of(dataset.sizes[:, 0]),
        boxes=_box_facts(dataset, truth),
        class_counts=class_counts,
        absent=tuple(name for name, count in zip(classes, class_counts) if not count),
        repeated_ids=truth.repeated_ids,
        file_names=frozenset(names),
        repeated_names=tuple(name for name, count in names.items() if count > 1),
    )


def _box_facts(dataset: Dataset, truth: GroundTruth) -> BoxFacts:
    boxes = dataset.records.boxes
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(axis=1)
    small, medium = int(np.sum(areas < SMALL)), int(np.sum((areas >= SMALL) & (areas < MEDIUM)))
    beyond = _pixels_beyond(dataset.records.sizes, truth)
    return BoxFacts(
        small=small,
        medium=medium,
        large=len(boxes) - small - medium,
        widths=Spread.of(sides[:, 0]),
        heights=Spread.of(sides[:, 1]),
        clipped=len(beyond),
        beyond=Spread.of(beyond),
    )


def _pixels_beyond(sizes: np.ndarray, truth: GroundTruth) -> np.ndarray:
    """By how many pixels, rounded, boxes of objects reach beyond their image: float64 `[k]`, for those that do."""
    found = []
    for image, box, crowd in zip(truth.images, truth.boxes.tolist(), truth.crowd):
        height, width = sizes[image].tolist()
        _, impossible = clip_box(box, width, height)
        if not impossible and not crowd:
            left, top, w, h = box
            found.append(max(-left, -top, left + w - width, top + h - height))
    beyond = np.rint(found)
    return beyond[beyond > 0]


def count_below(dataset: Dataset, min_side: int) -> int:
    """Number of images whose shorter side is below `min_side` pixels."""
    return int(np.sum(dataset.sizes.min(axis=1) < min_side))


def by_reason(problems: Sequence[Problem]) -> dict[str, list[str]]:
    """Subjects of problems by their reason, the most frequent reason first."""
    subjects: dict[str, list[str]] = {}
    for problem in problems:
        subjects.setdefault(problem.reason, []).append(problem.subject)
    return dict(sorted(subjects.items(), key=lambda item: -len(item[1])))


def open_images(dataset: Dataset, threads: int) -> Iterator[OpenedImage]:
    """Reads and decodes all images of a split on threads, in order."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        yield from pool.map(_open_image, dataset.records)


def _open_image(record: Record) -> OpenedImage:
    name = record.image.name
    try:
        data = record.image.read()
    except UnreadableImageError as error:
        return OpenedImage(name, "", MISSING, str(error))
    try:
        pixels = decode_annotated(data, record.image, record.height, record.width)
    except OtherSizeError as error:
        return OpenedImage(name, "", OTHER_SIZE, str(error))
    except UnreadableImageError as error:
        return OpenedImage(name, "", UNREADABLE, str(error))
    return OpenedImage(name, hashlib.sha256(data).hexdigest(), dark_bits=bits_if_dark(data, pixels))


def find_copies(images: Sequence[OpenedImage]) -> list[tuple[str, ...]]:
    """Names of images whose files are the same, byte by byte."""
    names: dict[str, list[str]] = {}
    for image in images:
        if image.digest:
            names.setdefault(image.digest, []).append(image.name)
    return [tuple(same) for same in names.values() if len(same) > 1]


def compare_splits(
    train: AnnotationFacts,
    val: AnnotationFacts,
    train_images: Sequence[OpenedImage],
    val_images: Sequence[OpenedImage],
) -> Overlap:
    """What the training split and the validation split have in common, both sorted."""
    digests = {image.digest for image in train_images}
    # Of copies within the validation split, the last one is named.
    shared = {image.digest: image.name for image in val_images if image.digest and image.digest in digests}
    return Overlap(tuple(sorted(train.file_names & val.file_names)), tuple(sorted(shared.values())))


def training_obstacle(images: Sequence[OpenedImage], usable: Dataset) -> str:
    """Why no image of a training split can be trained on, as part of a sentence; "" if some can.

    Args:
      images: what opening all images of the split has shown.
      usable: the part of the split that training uses.
    """
    if not usable.records.counts.sum():
        return "no object is left to train on"
    if any(image.digest for image in images) and not any(images[place].digest for place in usable.records.order):
        return "none of the images that training would use can be read"
    return ""


def plan_facts(plan: TrainPlan) -> PlanFacts:
    """What the first epoch of a plan is like."""
    batches = [plan[step] for step in range(plan.steps_per_epoch)]
    shapes = collections.Counter(batch.shape for batch in batches)
    padded = sum(len(batch.slots) * batch.shape[0] * batch.shape[1] for batch in batches)
    filled = sum(slot.geometry.size[0] * slot.geometry.size[1] for batch in batches for slot in batch.slots)
    return PlanFacts(
        images_per_step=plan.batch_size,
        steps=plan.steps_per_epoch,
        batches={shape: shapes[shape] for shape in plan.buckets},
        padding=padded / filled - 1,
    )
