"""Detection in pictures that are too large for one look: tile by tile, with what lies on seams found once."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections

MERGES = ("nmm", "nms")
# What two boxes of a class share above which they are one object: for `nmm` of the smaller one, since a tile may show a part
# of an object alone; for `nms` of both together.
SHARED = 0.5


class Detector(Protocol):
    """Detects objects in each of several images."""

    def __call__(self, images: list[np.ndarray], threshold: float) -> list[Detections]: ...


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a picture is cut, and what is found put together.

    Attributes:
      side: of the tiles in pixels; pictures that are smaller are one tile.
      overlap: part of the side that neighbours share. Objects of that size are whole in one tile at least.
      merge: `nmm` (non-maximum merging) makes one box of the parts of an object, `nms` keeps the best one.

    Raises:
      UserError: there is no such tiling.
    """

    side: int
    overlap: float = 0.2
    merge: str = "nmm"

    def __post_init__(self) -> None:
        if self.side < 1:
            raise UserError(f"Tiles have a side of {self.side} pixels; give at least 1.")
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"Tiles overlap by {self.overlap:g} of their side; give a part from 0 to 0.9.")
        if self.merge not in MERGES:
            raise UserError(f"Boxes of tiles are merged by {' or '.join(MERGES)}, not by {self.merge!r}.")

    def starts(self, length: int) -> list[int]:
        """Where tiles begin along one side of a picture. The last one ends where the picture does, so that all have one
        size."""
        step = max(round(self.side * (1 - self.overlap)), 1)
        return [*range(0, max(length - self.side, 0), step), max(length - self.side, 0)]

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of every tile of a picture."""
        return [(top, left) for top in self.starts(height) for left in self.starts(width)]


def detect_in_tiles(
    detector: Detector, image: np.ndarray, tiling: Tiling, threshold: float, *, batch_size: int
) -> Detections:
    """What a detector finds in the tiles of an image, in pixels of the image, best first.

    Args:
      detector: is given all tiles in the same size.
      image: RGB uint8 `[h, w, 3]`.
      threshold: lowest score of the detections.
      batch_size: tiles that are given to the detector at once.
    """
    corners = tiling.corners(*image.shape[:2])
    found = []
    for start in range(0, len(corners), batch_size):
        some = corners[start : start + batch_size]
        tiles = [image[top : top + tiling.side, left : left + tiling.side] for top, left in some]
        found += [_moved(one, *corner) for one, corner in zip(detector(tiles, threshold), some)]
    return _merged(image, found, tiling.merge)


def _moved(found: Detections, top: int, left: int) -> Detections:
    """The detections of a tile in pixels of the image."""
    return dataclasses.replace(found, boxes=found.boxes + np.array([left, top] * 2, np.float32))


def _merged(image: np.ndarray, found: Sequence[Detections], merge: str) -> Detections:
    """All detections of the tiles of an image, those of one object as one, best first."""
    boxes, scores, labels = (np.concatenate([getattr(one, key) for one in found]) for key in ("boxes", "scores", "labels"))
    names, ids = ([entry for one in found for entry in getattr(one, key)] for key in ("names", "category_ids"))
    order = np.argsort(-scores, kind="stable")
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    if merge == "nmm":
        kept, boxes = join_parts(boxes, labels)
    else:
        # Imported here, since it takes a second.
        import supervision as sv

        rows = np.concatenate([boxes, scores[:, None], labels[:, None]], axis=1)
        kept = np.flatnonzero(sv.box_non_max_suppression(rows, SHARED)) if len(rows) else np.zeros(0, int)
        boxes = boxes[kept]
    return Detections(
        image=image,
        boxes=boxes,
        scores=scores[kept],
        labels=labels[kept],
        names=[names[place] for place in order[kept]],
        category_ids=[ids[place] for place in order[kept]],
    )


def join_parts(boxes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins the boxes of parts of one object: of a class, and one shares more than `SHARED` of its area with the other.

    A box that has grown may share more than before, so that boxes are joined until none is left to join. (The merging of
    supervision, which looks at each pair once, leaves parts over.)

    Args:
      boxes: xyxy `[n, 4]`, the best first.
      labels: their classes, `[n]`.

    Returns:
      The places of the best part of each object, `[k]`, and the boxes around all of its parts, float32 `[k, 4]`.
    """
    kept, around = np.arange(len(boxes)), boxes.astype(np.float32)
    changed = True
    while changed:
        changed = False
        for place in range(len(kept)):
            if kept[place] < 0:
                continue
            share = _shared_of_smaller(around[place], around)
            same = (kept >= 0) & (labels[np.maximum(kept, 0)] == labels[kept[place]]) & (share > SHARED)
            same[: place + 1] = False
            if same.any():
                group = around[same | (np.arange(len(kept)) == place)]
                around[place] = [*group[:, :2].min(axis=0), *group[:, 2:].max(axis=0)]
                kept[same], changed = -1, True
        kept, around = kept[kept >= 0], around[kept >= 0]
    return kept, around


def _shared_of_smaller(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The area that a box `[4]` shares with each of others `[n, 4]`, as a part of the smaller one's: `[n]`."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    smaller = np.minimum(np.prod(box[2:] - box[:2]), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    return np.prod(np.maximum(sides, 0), axis=1) / np.maximum(smaller, 1e-9)
