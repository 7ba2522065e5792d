"""The objects of a view."""

import dataclasses

import numpy as np

from hpr_jax.data.augmentation.regions import Region


@dataclasses.dataclass(frozen=True)
class Objects:
    """Objects of a view, in its pixels.

    Attributes:
      boxes: float32 xyxy `[n, 4]`.
      labels: int32 `[n]`.
      regions: masks, one for each object; None where masks play no part.
    """

    boxes: np.ndarray
    labels: np.ndarray
    regions: tuple[Region, ...] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, which: np.ndarray) -> "Objects":
        """Some of the objects: indices, or bool `[n]`."""
        indices = np.arange(len(self))[which]
        regions = None if self.regions is None else tuple(self.regions[index] for index in indices)
        return Objects(self.boxes[indices], self.labels[indices], regions)


def join(first: Objects, second: Objects) -> Objects:
    """All objects of both, which have regions."""
    boxes, labels = np.concatenate([first.boxes, second.boxes]), np.concatenate([first.labels, second.labels])
    return Objects(boxes, labels, first.regions + second.regions)
