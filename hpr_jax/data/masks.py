"""Masks of objects as they are annotated: COCO's segmentations, polygons or run lengths, checked and packed.

`augmentation/drawn_masks.py` draws them into the pixels of a view.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from hpr_jax.errors import shown

# A mask as the union of polygons: of each the corners (x, y) in pixels, float32 `[k, 2]`.
Polygons = tuple[np.ndarray, ...]
# A mask as COCO's compressed run lengths: "size" is [height, width], "counts" are bytes.
RunLengths = Mapping[str, Any]
# An annotated mask.
Mask = Polygons | RunLengths


class MalformedMaskError(Exception):
    """A segmentation is no mask. The message says why, and completes a sentence that begins with 'its segmentation'."""


def parse_segmentation(segmentation: Any, height: int, width: int) -> Mask:
    """The mask that a COCO annotation's `segmentation` describes, in an image of this size in pixels.

    A list of numbers counts as one polygon, since some exporters leave out the list around it. Polygons with fewer than
    three corners are left out.

    Raises:
      MalformedMaskError: the segmentation is no mask, or no polygon is left.
    """
    if isinstance(segmentation, list):
        if segmentation and all(isinstance(number, int | float) for number in segmentation):
            segmentation = [segmentation]
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
            with np.errstate(over="ignore"):
                # What float32 cannot hold becomes infinite, and is left out below.
                corners = np.array(polygon, np.float32)
        except (TypeError, ValueError, OverflowError):
            raise MalformedMaskError("has a polygon that is not a list of numbers") from None
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2:
            continue
        corners = corners.reshape(-1, 2)
        right, bottom = np.abs(corners).max(axis=0).tolist()
        if not (math.isfinite(right) and math.isfinite(bottom)):
            continue
        # pycocotools walks along each outline pixel by pixel; far outside the image it would write beyond its memory.
        if right > 2 * width or bottom > 2 * height:
            raise MalformedMaskError("has a corner far outside its image")
        polygons.append(corners)
    if not polygons:
        raise MalformedMaskError("has no polygon of at least three corners")
    return tuple(polygons)


def _parse_run_lengths(segmentation: dict[str, Any], height: int, width: int) -> RunLengths:
    size: Any = segmentation.get("size")
    counts: Any = segmentation.get("counts")
    if size != [height, width]:
        raise MalformedMaskError(f"has the size {shown(size)}, and its image is {[height, width]} pixels high and wide")
    # Lengths that do not add up to the size would make pycocotools read or write beyond its memory.
    try:
        lengths = _decompress(counts) if isinstance(counts, str) else [_whole_number(count) for count in counts]
    except (TypeError, ValueError, IndexError, OverflowError):
        raise MalformedMaskError("has counts that are no run lengths") from None
    if min(lengths, default=-1) < 0 or sum(lengths) != height * width:
        raise MalformedMaskError("has run lengths that do not add up to its size")
    return coco_mask.frPyObjects({"size": size, "counts": lengths}, height, width)


def mask_box(mask: Mask) -> tuple[float, float, float, float]:
    """The bounds of a mask: left, top, width, height in pixels."""
    if isinstance(mask, Mapping):
        left, top, width, height = coco_mask.toBbox(mask).tolist()
        return left, top, width, height
    corners = np.concatenate(mask).astype(np.float64)
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return left, top, right - left, bottom - top


def _whole_number(count: Any) -> int:
    if int(count) != count:
        raise ValueError(count)
    return int(count)


def _decompress(text: str) -> list[int]:
    """Decodes COCO's compressed run lengths.

    Each character holds five bits of a number, lowest bits first, and a bit that says whether more follow. From the fourth
    number on, a number is the difference to the length two places before.
    """
    lengths: list[int] = []
    place = 0
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
    """The masks of n objects in a few arrays; an object may have none.

    Attributes:
      corners: corners of all polygons, float32 `[c, 2]`.
      polygon_starts: where each polygon's corners begin in `corners`, int64 `[p + 1]`.
      mask_starts: where each object's polygons begin in `polygon_starts`, int64 `[n + 1]`.
      run_lengths: the masks that are run lengths, by the index of their object.
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
        """The masks of the objects from `start` to before `stop`, None for those without."""
        return tuple(self[index] for index in range(start, stop))

    def present(self) -> np.ndarray:
        """Which objects have a mask: bool `[n]`."""
        has_mask = np.diff(self.mask_starts) > 0
        has_mask[list(self.run_lengths)] = True
        return has_mask

    class Packer:
        """Packs masks one by one."""

        def __init__(self) -> None:
            self.corners = bytearray()
            self.polygon_starts, self.mask_starts = [0], [0]
            self.run_lengths: dict[int, RunLengths] = {}

        def extend(self, masks: Iterable[Mask | None]) -> None:
            """Adds the masks of further objects."""
            for mask in masks:
                if isinstance(mask, Mapping):
                    self.run_lengths[len(self.mask_starts) - 1] = mask
                elif mask is not None:
                    for polygon in mask:
                        self.corners += polygon.tobytes()
                        self.polygon_starts.append(self.polygon_starts[-1] + len(polygon))
                self.mask_starts.append(len(self.polygon_starts) - 1)

        def finish(self) -> "PackedMasks":
            """All masks that were added."""
            corners = np.frombuffer(bytes(self.corners), np.float32).reshape(-1, 2)
            return PackedMasks(corners, np.array(self.polygon_starts), np.array(self.mask_starts), self.run_lengths)
