"""The plan of batches: which images each is made of, and which shape they are padded to, decided before any is loaded.

Buckets are the few static shapes to which images are padded; each compiles programs of its own.

An epoch's plan follows from (seed, epoch), so that every process has the same plan, and a run that is resumed at any step
goes on as if it had not been stopped. What is drawn when an image is loaded follows from the seed of its slot.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hpr_jax.data.augmentation.crop_resize_flip import Geometry, Slot
from hpr_jax.data.loading.repeats import draw_repeats

# Padded sides are multiples of this. Finer steps would save nothing, since the coarsest feature map has stride 64.
GRID = 32

# (height, width) in pixels.
Shape = tuple[int, int]

DrawGeometry = Callable[[np.random.Generator], list[Geometry]]


def choose_buckets(sizes: np.ndarray, count: int, cover: Sequence[Shape] = ()) -> list[Shape]:
    """At most `count` padded shapes that hold all images with little padding, smallest first.

    The search starts with every size that occurs, rounded up to the grid. Until few enough are left, it replaces two shapes
    by the smallest shape that holds both, taking the two for which this adds the fewest pixels of padding.

    Args:
      sizes: (height, width) of the images, `[M, 2]`.
      cover: further sizes that must fit although no image may have them.
    """
    sizes, covered = np.asarray(sizes, np.int64).reshape(-1, 2), np.asarray(cover, np.int64).reshape(-1, 2)
    shapes, index = np.unique(-(-np.concatenate([sizes, covered]) // GRID) * GRID, axis=0, return_inverse=True)
    # A covered size counts like one image in a hundred. If it counted nothing, two covered sizes would be joined for free,
    # into a shape larger than every image.
    weights = np.ones(len(sizes) + len(covered), np.int64)
    weights[len(sizes) :] = max(len(sizes) // 100, 1)
    counts = np.bincount(index.ravel(), weights, minlength=len(shapes)).astype(np.int64)
    while len(shapes) > count:
        area = shapes.prod(axis=1)
        joined = np.maximum(shapes[:, None], shapes[None, :])
        cost = joined.prod(axis=-1) * (counts[:, None] + counts) - (area * counts)[:, None] - area * counts
        np.fill_diagonal(cost, np.iinfo(cost.dtype).max)
        a, b = np.unravel_index(np.argmin(cost), cost.shape)
        shapes[a], counts[a] = joined[a, b], counts[a] + counts[b]
        shapes, counts = np.delete(shapes, b, axis=0), np.delete(counts, b)
    buckets = {(int(h), int(w)) for h, w in shapes}
    return sorted(buckets, key=lambda shape: (shape[0] * shape[1], shape))


def fits(size: Shape, bucket: Shape) -> bool:
    """Whether an image of this size can be padded to the bucket."""
    return size[0] <= bucket[0] and size[1] <= bucket[1]


def smallest_bucket(buckets: Sequence[Shape], size: Shape) -> Shape:
    """The first of the buckets, which are ordered by area, that holds an image of this size.

    Raises:
      ValueError: no bucket holds it.
    """
    for bucket in buckets:
        if fits(size, bucket):
            return bucket
    raise ValueError(f"No bucket of {buckets} holds an image of {size}.")


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """The slots of a batch and their common padded (height, width)."""

    shape: Shape
    slots: tuple[Slot, ...]


class TrainPlan:
    """An endless sequence of batches. Every epoch has a new order of the images and new geometries.

    An epoch shuffles the images and collects them by their smallest bucket; when a bucket has a batch of images, they become
    one. The images that are left over in the end are put together, in a random order, in the bucket that holds most of them.
    A batch that is still short is filled up with images that the epoch had already, or else with its own again. So each
    epoch has `count // batch_size` batches. A few images may find no place in an epoch, others in each.

    Args:
      draw: draws the geometry of every image of the data set.
      count: number of images in the data set, at least `batch_size`.
      buckets: padded shapes, smallest first, that hold every size which `draw` can give.
      seed: the epochs are drawn from it.
      repeats: how often an epoch takes each image, on average, as `repeat_factors` says; None: once.
    """

    def __init__(
        self,
        draw: DrawGeometry,
        count: int,
        *,
        batch_size: int,
        buckets: Sequence[Shape],
        seed: int,
        repeats: np.ndarray | None = None,
    ):
        self.draw, self.count, self.batch_size, self.buckets, self.seed = draw, count, batch_size, buckets, seed
        self.repeats = repeats
        self.steps_per_epoch = (count if repeats is None else round(float(repeats.sum()))) // batch_size
        self._cache_epochs()

    def _cache_epochs(self) -> None:
        # Two, since batches that are loaded ahead, and stand-ins for unreadable images, may be those of the next epoch.
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
        """Slots that can take the place of unreadable images in the batch of `step`: of the steps behind it, fewer than
        `limit`, first all slots of batches with the same shape, then all whose images fit into it."""
        shape, later = self[step].shape, range(step + 1, step + limit)
        for other in later:
            if self[other].shape == shape:
                yield from self[other].slots
        for other in later:
            yield from (slot for slot in self[other].slots if fits(slot.geometry.size, shape))

    def _slots(self, epoch: int, rng: np.random.Generator) -> Iterator[Slot]:
        """The slots of an epoch, in a random order."""
        if self.repeats is None:
            order = rng.permutation(self.count)
            geometries = [self.draw(rng)]
        else:
            taken = draw_repeats(self.repeats, rng)
            # The k-th copy of an image is number k * count more than the image.
            numbers = [np.flatnonzero(taken > copy) + copy * self.count for copy in range(int(taken.max()))]
            order = rng.permutation(np.concatenate(numbers))
            geometries = [self.draw(rng) for _ in numbers]
        for number in map(int, order):
            copy, index = divmod(number, self.count)
            # The seed is never (seed, epoch, 0), which NumPy takes for (seed, epoch), the epoch's own.
            yield Slot(index, geometries[copy][index], (self.seed, epoch, number + 1))

    def _make_epoch(self, epoch: int) -> list[PlannedBatch]:
        rng = np.random.default_rng((self.seed, epoch))
        waiting: dict[Shape, list[Slot]] = {}
        batches = []
        for slot in self._slots(epoch, rng):
            shape = smallest_bucket(self.buckets, slot.geometry.size)
            queue = waiting.setdefault(shape, [])
            queue.append(slot)
            if len(queue) == self.batch_size:
                batches.append(PlannedBatch(shape, tuple(queue)))
                queue.clear()
        # In a random order: in that of their sizes, it would always be large images that find no place.
        waited = [slot for shape in sorted(waiting) for slot in waiting[shape]]
        left = [waited[place] for place in rng.permutation(len(waited))]
        while len(batches) < self.steps_per_epoch:
            shape = max(self.buckets, key=lambda shape: sum(fits(slot.geometry.size, shape) for slot in left))
            chosen = [slot for slot in left if fits(slot.geometry.size, shape)][: self.batch_size]
            left = [slot for slot in left if slot not in chosen]
            earlier = (slot for batch in batches for slot in batch.slots if fits(slot.geometry.size, shape))
            again = itertools.chain(earlier, itertools.cycle(chosen))
            chosen = [*chosen, *itertools.islice(again, self.batch_size - len(chosen))]
            batches.append(PlannedBatch(shape, tuple(chosen)))
        return batches


def evaluation_plan(geometries: Sequence[Geometry], *, batch_size: int, buckets: Sequence[Shape]) -> list[PlannedBatch]:
    """Batches with every image once, in its smallest bucket. The last batch of a bucket may be shorter than the others."""
    groups: dict[Shape, list[Slot]] = {}
    for index, geometry in enumerate(geometries):
        groups.setdefault(smallest_bucket(buckets, geometry.size), []).append(Slot(index, geometry))
    return [
        PlannedBatch(shape, tuple(slots[start : start + batch_size]))
        for shape, slots in sorted(groups.items())
        for start in range(0, len(slots), batch_size)
    ]
