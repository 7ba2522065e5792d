"""Masks drawn into the pixels of a view."""

import dataclasses
from collections.abc import Iterable, Mapping

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from hpr_jax.data.masks import Mask, Patch


@dataclasses.dataclass(frozen=True)
class Region:
    """The part of a canvas that holds a mask.

    Attributes:
      left, top: of the part, in pixels of the canvas.
      bitmap: uint8 `[h, w]`, 1 inside the mask; never written to.
    """

    left: int
    top: int
    bitmap: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas."""
        height, width = self.bitmap.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return cv2.countNonZero(self.bitmap) if self.bitmap.size else 0

    @property
    def box(self) -> np.ndarray:
        """The smallest xyxy box around the mask, float32 `[4]`; zeros if it is empty."""
        left, top, width, height = cv2.boundingRect(self.bitmap) if self.bitmap.size else (0, 0, 0, 0)
        if not width:
            return np.zeros(4, np.float32)
        left, top = left + self.left, top + self.top
        return np.array([left, top, left + width, top + height], np.float32)

    def warp(self, matrix: np.ndarray, size: tuple[int, int]) -> "Region":
        """Moves the mask as `cv2.warpAffine` moves an image: `matrix` `[2, 3]` maps centres of pixels, and what leaves the
        (height, width) `size` is cut off."""
        height, width = self.bitmap.shape
        low, high = np.array([self.left, self.top]) - 0.5, np.array([self.left + width, self.top + height]) - 0.5
        corners = np.array([low, [high[0], low[1]], [low[0], high[1]], high]) @ matrix[:, :2].T + matrix[:, 2]
        left, top, right, bottom = _bounds(corners + 0.5, size)
        if right <= left or bottom <= top:
            return EMPTY
        offset = matrix[:, :2] @ [self.left, self.top] + matrix[:, 2] - [left, top]
        local = np.concatenate([matrix[:, :2], offset[:, None]], axis=1)
        return Region(left, top, cv2.warpAffine(self.bitmap, local, (right - left, bottom - top), flags=cv2.INTER_LINEAR))

    def without(self, patches: Iterable[Patch]) -> "Region":
        """The mask outside of rectangles."""
        bitmap = self.bitmap.copy()
        for left, top, right, bottom in patches:
            rows = slice(max(top - self.top, 0), max(bottom - self.top, 0))
            bitmap[rows, max(left - self.left, 0) : max(right - self.left, 0)] = 0
        return Region(self.left, self.top, bitmap)

    def behind(self, cover: np.ndarray) -> "Region":
        """The mask where `cover`, uint8 of the canvas' size, is 0."""
        return Region(self.left, self.top, self.bitmap & (1 - cover[self.window]))


EMPTY = Region(0, 0, np.zeros((0, 0), np.uint8))


def box_region(box: np.ndarray, size: tuple[int, int]) -> Region:
    """All of an xyxy box, rounded to pixels and cut off at (height, width) `size`."""
    left, top, right, bottom = _bounds(np.rint(box).reshape(2, 2), size)
    return Region(left, top, np.ones((max(bottom - top, 0), max(right - left, 0)), np.uint8))


def draw_mask(mask: Mask, matrix: np.ndarray, size: tuple[int, int]) -> Region:
    """Draws an annotated mask on a canvas of (height, width) `size`; `matrix` `[2, 3]` maps pixels of the annotated image to
    pixels of the canvas (edges, not centres: a pixel reaches from its index to the next)."""
    if isinstance(mask, Mapping):
        left, top, width, height = map(int, coco_mask.toBbox(mask))
        whole = Region(left, top, coco_mask.decode(mask)[top : top + height, left : left + width])
        return whole.warp(on_centres(matrix), size) if whole.bitmap.size else EMPTY
    polygons = [polygon @ matrix[:, :2].T + matrix[:, 2] for polygon in mask]
    left, top, right, bottom = _bounds(np.concatenate(polygons), size)
    if right <= left or bottom <= top:
        return EMPTY
    shifted = [(polygon - [left, top]).ravel() for polygon in polygons]
    parts = coco_mask.frPyObjects(shifted, bottom - top, right - left)
    return Region(left, top, coco_mask.decode(coco_mask.merge(parts)))


def on_centres(matrix: np.ndarray) -> np.ndarray:
    """The same map `[2, 3]` between pixels' centres, as OpenCV wants it, of one between their edges."""
    return np.concatenate([matrix[:, :2], matrix[:, 2:] + 0.5 * matrix[:, :2].sum(axis=1, keepdims=True) - 0.5], axis=1)


def _bounds(points: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels around points `[k, 2]`, within (height, width) `size`: left, top, right, bottom."""
    limit = np.array(size[::-1])
    low, high = np.floor(points.min(axis=0)).clip(0, limit), np.ceil(points.max(axis=0)).clip(0, limit)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])
