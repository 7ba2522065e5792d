"""Which images make up which batch, in which padded shape: decided before anything is loaded.

Everything follows from (seed, epoch), so that every process has the same plan, and a run resumed at step n goes on as the
one that was not stopped. What is drawn when an image is loaded follows from its slot's seed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hpr_jax.data.augmentation.geometry import Geometry, Slot
from hpr_jax.data.loading.buckets import Shape, fits, smallest_bucket

DrawGeometry = Callable[[np.random.Generator], list[Geometry]]


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """The slots of a batch and their common padded (height, width)."""

    shape: Shape
    slots: tuple[Slot, ...]


class TrainPlan:
    """An endless sequence of batches, epoch after epoch in a new order with new geometries.

    Each epoch shuffles the images and collects them by bucket. What is left over at its end is joined, in a bucket that
    holds most of it; a batch that stays short is filled with images that the epoch had already. So every epoch has
    `count // batch_size` batches; the few images that find no place are others in each epoch.

    Args:
      draw: draws the geometry of every image of the data set.
      count: images in the data set, at least `batch_size`.
      buckets: hold every size that `draw` can give.
    """

    def __init__(self, draw: DrawGeometry, count: int, *, batch_size: int, buckets: Sequence[Shape], seed: int):
        self.draw, self.count, self.batch_size, self.buckets, self.seed = draw, count, batch_size, buckets, seed
        self.steps_per_epoch = count // batch_size
        self._cache_epochs()

    def _cache_epochs(self) -> None:
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._cache_epochs()

    def __getitem__(self, step: int) -> PlannedBatch:
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place]

    def successors(self, step: int, limit: int = 1000) -> Iterator[Slot]:
        """Slots planned behind `step` to stand in for images that cannot be read: first those of batches of its shape,
        then all that fit into it."""
        shape, later = self[step].shape, range(step + 1, step + limit)
        for other in later:
            if self[other].shape == shape:
                yield from self[other].slots
        for other in later:
            yield from (slot for slot in self[other].slots if fits(slot.geometry.size, shape))

    def _make_epoch(self, epoch: int) -> list[PlannedBatch]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.count)
        geometries = self.draw(rng)
        waiting: dict[Shape, list[Slot]] = {}
        batches = []
        for index in order:
            # Never (seed, epoch, 0): that would be the epoch's own stream.
            slot = Slot(int(index), geometries[index], (self.seed, epoch, int(index) + 1))
            shape = smallest_bucket(self.buckets, slot.geometry.size)
            queue = waiting.setdefault(shape, [])
            queue.append(slot)
            if len(queue) == self.batch_size:
                batches.append(PlannedBatch(shape, tuple(queue)))
                queue.clear()
        left = [slot for shape in sorted(waiting) for slot in waiting[shape]]
        while len(batches) < self.steps_per_epoch:
            shape = max(self.buckets, key=lambda shape: sum(fits(slot.geometry.size, shape) for slot in left))
            chosen = [slot for slot in left if fits(slot.geometry.size, shape)][: self.batch_size]
            left = [slot for slot in left if slot not in chosen]
            again = (slot for batch in batches for slot in batch.slots if fits(slot.geometry.size, shape))
            chosen += itertools.islice(again, self.batch_size - len(chosen))
            batches.append(PlannedBatch(shape, tuple(chosen)))
        return batches


def evaluation_plan(geometries: Sequence[Geometry], *, batch_size: int, buckets: Sequence[Shape]) -> list[PlannedBatch]:
    """Every image once, by bucket; the last batch of a bucket may be shorter."""
    groups: dict[Shape, list[Slot]] = {}
    for index, geometry in enumerate(geometries):
        groups.setdefault(smallest_bucket(buckets, geometry.size), []).append(Slot(index, geometry))
    return [
        PlannedBatch(shape, tuple(slots[start : start + batch_size]))
        for shape, slots in sorted(groups.items())
        for start in range(0, len(slots), batch_size)
    ]
