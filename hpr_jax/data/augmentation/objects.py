"""The objects of a view."""

import dataclasses

import numpy as np

from hpr_jax.data.augmentation.drawn_masks import DrawnMask


@dataclasses.dataclass(frozen=True)
class Objects:
    """Objects of a view, in its pixels.

    Attributes:
      boxes: float32 xyxy `[n, 4]`.
      labels: int32 `[n]`.
      masks: the mask of each object; () if masks play no part.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: tuple[DrawnMask, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, which: np.ndarray) -> "Objects":
        """Some of the objects: indices, or bool `[n]`."""
        indices = np.arange(len(self))[which]
        masks = tuple(self.masks[index] for index in indices) if self.masks else ()
        return Objects(self.boxes[indices], self.labels[indices], masks)


def join(first: Objects, second: Objects) -> Objects:
    """The objects of both, which all have masks."""
    boxes, labels = np.concatenate([first.boxes, second.boxes]), np.concatenate([first.labels, second.labels])
    return Objects(boxes, labels, first.masks + second.masks)
