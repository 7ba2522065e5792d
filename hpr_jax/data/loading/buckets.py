"""Buckets: the few static shapes to which images are padded."""

from collections.abc import Sequence

import numpy as np

# Padded sides are multiples of this. Finer steps would save nothing, since the coarsest feature map has stride 64.
GRID = 32

# (height, width) in pixels.
Shape = tuple[int, int]


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
