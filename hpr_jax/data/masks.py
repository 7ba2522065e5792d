"""Masks of objects: COCO's segmentations (polygons, run lengths), checked, and drawn where they are needed.

A drawn mask is a `Region`, the part of a canvas that holds it: work grows with the objects, not with the canvas.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# (left, top, right, bottom) in pixels.
Patch = tuple[int, int, int, int]
# Polygons `[k, 2]` of (x, y) in pixels, whose union is the mask; or COCO's compressed run lengths.
Polygons = tuple[np.ndarray, ...]
RunLengths = Mapping[str, Any]
Mask = Polygons | RunLengths


class MalformedMaskError(Exception):
    """A segmentation that is no mask; says why, to be read behind 'its segmentation'."""


def parse_segmentation(segmentation: Any, height: int, width: int) -> Mask:
    """The mask of an annotation, in an image of this size; polygons without three corners are left out.

    Raises:
      MalformedMaskError: no mask is left.
    """
    if isinstance(segmentation, list):
        return _parse_polygons(segmentation, height, width)
    if isinstance(segmentation, dict):
        return _parse_run_lengths(segmentation, height, width)
    raise MalformedMaskError("is neither a list of polygons nor run lengths")


def _parse_polygons(segmentation: list, height: int, width: int) -> Polygons:
    polygons = []
    for polygon in segmentation:
        if not isinstance(polygon, list):
            raise MalformedMaskError("is not a list of polygons, each a list of numbers")
        try:
            corners = np.array(polygon, np.float32)
        except (TypeError, ValueError):
            raise MalformedMaskError("has a polygon that is not a list of numbers") from None
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2:
            continue
        corners = corners.reshape(-1, 2)
        right, bottom = np.abs(corners).max(axis=0).tolist()
        if not (math.isfinite(right) and math.isfinite(bottom)):
            continue
        # pycocotools walks along every outline, and beyond its memory along endless ones.
        if right > 2 * width or bottom > 2 * height:
            raise MalformedMaskError("has a corner far outside its image")
        polygons.append(corners)
    if not polygons:
        raise MalformedMaskError("has no polygon of at least three corners")
    return tuple(polygons)


def _parse_run_lengths(segmentation: dict, height: int, width: int) -> RunLengths:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise MalformedMaskError(f"has the size {size}, and its image is {[height, width]} pixels high and wide")
    # pycocotools reads or writes beyond its memory when the lengths do not add up.
    try:
        lengths = _decompress(counts) if isinstance(counts, str) else [_whole(count) for count in counts]
    except (TypeError, ValueError, IndexError, OverflowError):
        raise MalformedMaskError("has counts that are no run lengths") from None
    if min(lengths, default=-1) < 0 or sum(lengths) != height * width:
        raise MalformedMaskError("has run lengths that do not add up to its size")
    return coco_mask.frPyObjects({"size": size, "counts": lengths}, height, width)


def _whole(count: Any) -> int:
    if int(count) != count:
        raise ValueError(count)
    return int(count)


def _decompress(text: str) -> list[int]:
    """COCO's compression of run lengths: little groups of five bits, from the fourth number on differences to the one but
    last."""
    lengths, place = [], 0
    while place < len(text):
        value = shift = 0
        more = True
        while more:
            bits = ord(text[place]) - 48
            if not 0 <= bits < 64:
                raise ValueError(text[place])
            value |= (bits & 31) << shift
            shift, place, more = shift + 5, place + 1, bool(bits & 32)
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
    return lengths


@dataclasses.dataclass(frozen=True)
class PackedMasks:
    """Masks, or None where there is none, in a few arrays.

    Attributes:
      corners: of all polygons, float32 `[c, 2]`.
      polygon_starts: where each polygon's corners begin, int64 `[p + 1]`.
      mask_starts: where each mask's polygons begin, int64 `[n + 1]`.
      run_lengths: the masks that are such, by index.
    """

    corners: np.ndarray
    polygon_starts: np.ndarray
    mask_starts: np.ndarray
    run_lengths: Mapping[int, RunLengths]

    def __getitem__(self, index: int) -> Mask | None:
        if index in self.run_lengths:
            return self.run_lengths[index]
        starts = self.polygon_starts[self.mask_starts[index] : self.mask_starts[index + 1] + 1]
        return tuple(self.corners[start:stop] for start, stop in itertools.pairwise(starts)) or None

    def between(self, start: int, stop: int) -> tuple[Mask | None, ...]:
        """The masks from `start` to before `stop`."""
        return tuple(self[index] for index in range(start, stop))

    def present(self) -> np.ndarray:
        """Where there is a mask: bool `[n]`."""
        has_mask = np.diff(self.mask_starts) > 0
        has_mask[list(self.run_lengths)] = True
        return has_mask

    class Packer:
        """Packs masks one by one."""

        def __init__(self):
            self.corners, self.polygons, self.masks, self.run_lengths = bytearray(), [0], [0], {}

        def extend(self, masks: Iterable[Mask | None]) -> None:
            """Adds masks."""
            for mask in masks:
                if isinstance(mask, Mapping):
                    self.run_lengths[len(self.masks) - 1] = mask
                elif mask is not None:
                    for polygon in mask:
                        self.corners += polygon.tobytes()
                        self.polygons.append(self.polygons[-1] + len(polygon))
                self.masks.append(len(self.polygons) - 1)

        def finish(self) -> "PackedMasks":
            """All masks that were added."""
            corners = np.frombuffer(bytes(self.corners), np.float32).reshape(-1, 2)
            return PackedMasks(corners, np.array(self.polygons), np.array(self.masks), self.run_lengths)
