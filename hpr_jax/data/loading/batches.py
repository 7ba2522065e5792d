"""Loading of planned batches: images are decoded, transformed and padded, and boxes are padded to a fixed number.

A training batch has the weak views of all its images, then, if there are any, their strong views in the same order.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from hpr_jax.data.augmentation.crop_resize_flip import Slot, apply_to_image
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.dataset import Dataset, Record
from hpr_jax.data.images import UnreadableImageError, read_annotated_image
from hpr_jax.data.loading.batch_plan import PlannedBatch, Shape, TrainPlan
from hpr_jax.data.loading.patience import Patience
from hpr_jax.data.loading.workers import LoadedByWorkers, keep_freed_memory
from hpr_jax.errors import DataLostError


@dataclasses.dataclass
class Batch:
    """A padded batch in host memory.

    Attributes:
      images: RGB uint8 `[B, H, W, 3]`, zero where padded.
      sizes: valid (height, width) of each image, int32 `[B, 2]`.
      boxes: float32 `[B, N, 4]`, cxcywh relative to the valid size; the real ones come first.
      labels: int32 `[B, N]`.
      valid: which boxes are real, bool `[B, N]`.
      records: the records of the images, None where the batch is only filled up.
      reports: sentences for the log.
      views: number of views of each image. View v of image i is at `v * (B // views) + i`.
    """

    images: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    records: list[Record | None]
    reports: list[str]
    views: int = 1


def empty_batch(batch_size: int, shape: Shape, max_boxes: int) -> Batch:
    """A batch without images. The size of each place is 1 x 1, so that nothing divides by zero."""
    return Batch(
        images=np.zeros((batch_size, *shape, 3), np.uint8),
        sizes=np.ones((batch_size, 2), np.int32),
        boxes=np.full((batch_size, max_boxes, 4), 0.5, np.float32),
        labels=np.zeros((batch_size, max_boxes), np.int32),
        valid=np.zeros((batch_size, max_boxes), bool),
        records=[None] * batch_size,
        reports=[],
    )


def fill_slot(batch: Batch, place: int, record: Record, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> None:
    """Puts a transformed image and its objects into a batch; objects that it has no room for are left out and reported.

    Args:
      place: index of the image in the batch.
      image: uint8 `[h, w, 3]`.
      boxes: xyxy `[n, 4]` in pixels of the image.
      labels: int32 `[n]`.
    """
    height, width = image.shape[:2]
    batch.images[place, :height, :width] = image
    batch.sizes[place] = height, width
    room = batch.boxes.shape[1]
    if len(boxes) > room:
        batch.reports.append(
            f"{record.image.name} has {len(boxes)} boxes, the batch has room for {room}; the rest is left out of this step"
        )
        boxes, labels = boxes[:room], labels[:room]
    count = len(boxes)
    scale = np.array([width, height], np.float32)
    batch.boxes[place, :count, :2] = (boxes[:, :2] + boxes[:, 2:]) / 2 / scale
    batch.boxes[place, :count, 2:] = (boxes[:, 2:] - boxes[:, :2]) / scale
    batch.labels[place, :count] = labels
    batch.valid[place, :count] = True
    batch.records[place] = record


class BatchLoader(Protocol):
    """Random access to batches."""

    def __getitem__(self, step: int, /) -> Batch: ...


class BatchIterator(Iterator[Batch], Protocol):
    """Batches in order, loaded ahead; `close()` ends the loading."""

    def close(self) -> object: ...


class TrainLoader:
    """Random access to the batches of a plan. If an image cannot be read, the next planned image that fits into the batch
    takes its place, and the batch reports it.

    Args:
      plan: which images a batch is made of.
      make_views: makes the views of an image.
      max_boxes: boxes that a view has room for.
      share: (index, count): the images of every batch are divided into `count` equal parts, and the part with this index is
        loaded. So several processes share the work.
      patience: seconds to wait for a folder of images that cannot be reached.

    Raises:
      ValueError: the images of a batch cannot be shared equally.
      DataLostError: in the place of a batch for which no image can be read any more.
    """

    def __init__(
        self,
        plan: TrainPlan,
        make_views: ViewMaker,
        max_boxes: int,
        share: tuple[int, int] = (0, 1),
        patience: float = 0.0,
    ):
        self.plan, self.make_views, self.max_boxes = plan, make_views, max_boxes
        self.patience = Patience(patience)
        index, count = share
        if plan.batch_size % count:
            raise ValueError(f"A batch of {plan.batch_size} images cannot be shared equally by {count} processes.")
        part = plan.batch_size // count
        self.places = slice(index * part, (index + 1) * part)

    def __getitem__(self, step: int, /) -> Batch:
        planned, views = self.plan[step], self.make_views.count
        slots = planned.slots[self.places]
        batch = empty_batch(views * len(slots), planned.shape, self.max_boxes)
        batch.views = views
        for place, slot in enumerate(slots):
            try:
                self._load(batch, place, slot)
            except UnreadableImageError as error:
                self._refill(batch, place, step, slot, error)
        return batch

    def _load(self, batch: Batch, place: int, slot: Slot) -> None:
        """Puts the views of one image into the batch. If the image cannot be read, the batch stays as it is."""
        views, reports = self.patience(lambda: self.make_views(slot))
        batch.reports += reports
        for number, view in enumerate(views):
            record = self.make_views.dataset.records[slot.index]
            target = number * (len(batch.images) // batch.views) + place
            fill_slot(batch, target, record, view.image, view.objects.boxes, view.objects.labels)

    def _refill(self, batch: Batch, place: int, step: int, slot: Slot, error: Exception) -> None:
        """Puts the views of another planned image in the place of one that cannot be read."""
        tried = {slot.index}
        for other in self.plan.successors(step):
            if other.index in tried:
                continue
            tried.add(other.index)
            try:
                self._load(batch, place, other)
            except UnreadableImageError as another:
                batch.reports.append(f"{another}; it cannot take the place of another")
                continue
            batch.reports.append(f"{error}; {self.make_views.dataset.records[other.index].image.name} takes its place")
            return
        raise DataLostError(f"{error}, and none of the images planned next could be read in its place.")


def train_batches(loader: BatchLoader, start: int, stop: int, threads: int, workers: int = 0) -> BatchIterator:
    """The batches of the steps from `start` to before `stop`, loaded ahead by worker processes, or by threads of this
    process if `workers` is 0. The batches and their order are the same either way.

    The iterator raises what the loader raises, and:
      RunError: a worker process ended before its time.
    """
    keep_freed_memory()
    if workers:
        return LoadedByWorkers(loader, range(start, stop), workers)
    return _loaded_by_threads(loader, range(start, stop), threads)


def _loaded_by_threads(loader: BatchLoader, steps: range, threads: int) -> BatchIterator:
    """Batches in order; at most two for each thread are loaded ahead."""
    # Not imported above, since Grain imports JAX, which worker processes do without, and they import this file.
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(lambda step: loader[int(step)])
    return iter(dataset.to_iter_dataset(options))


class EvaluationLoader:
    """Random access to the batches of an evaluation plan, all filled up to `batch_size`. Images that cannot be read are left
    out, and the batch reports them.

    Args:
      share: (index, count): every `count`-th batch is loaded, from `index` on. So several processes share the work.
      patience: seconds to wait for a folder of images that cannot be reached.

    Raises:
      DataLostError: in the place of a batch, if the folder cannot be reached for longer.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Sequence[PlannedBatch],
        batch_size: int,
        share: tuple[int, int] = (0, 1),
        patience: float = 0.0,
    ):
        index, count = share
        self.dataset, self.plan, self.batch_size = dataset, plan[index::count], batch_size
        self.patience = Patience(patience)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int, /) -> Batch:
        planned = self.plan[index]
        batch = empty_batch(self.batch_size, planned.shape, max_boxes=0)
        for place, slot in enumerate(planned.slots):
            record = self.dataset.records[slot.index]
            try:
                read = functools.partial(read_annotated_image, record.image, record.height, record.width)
                image = self.patience(read)
            except UnreadableImageError as error:
                batch.reports.append(f"{error}; it has no detections")
                continue
            no_boxes, no_labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
            fill_slot(batch, place, record, apply_to_image(image, slot.geometry), no_boxes, no_labels)
        return batch


def evaluation_batches(loader: EvaluationLoader, threads: int) -> BatchIterator:
    """All batches in order, loaded ahead by threads."""
    return _loaded_by_threads(loader, range(len(loader)), threads)
