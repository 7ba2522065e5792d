"""Masks drawn into the pixels of a view.

A drawn mask holds the part of the canvas around it alone, so that work grows with the objects and not with the canvas.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from hpr_jax.data.masks import Mask

# A rectangle: (left, top, right, bottom) in pixels of a canvas.
Patch = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class DrawnMask:
    """A mask in the pixels of a canvas.

    Attributes:
      left, top: where the bitmap lies, in pixels of the canvas.
      bitmap: uint8 `[h, w]`, 1 inside the mask, 0 outside; it is never written to.
    """

    left: int
    top: int
    bitmap: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas that the bitmap covers."""
        height, width = self.bitmap.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def area(self) -> int:
        """Number of pixels inside the mask."""
        return cv2.countNonZero(self.bitmap) if self.bitmap.size else 0

    @property
    def box(self) -> np.ndarray:
        """The smallest box around the mask, float32 xyxy `[4]` in pixels of the canvas; zeros if the mask is empty."""
        left, top, width, height = cv2.boundingRect(self.bitmap) if self.bitmap.size else (0, 0, 0, 0)
        if not width:
            return np.zeros(4, np.float32)
        left, top = left + self.left, top + self.top
        return np.array([left, top, left + width, top + height], np.float32)

    def warp(self, matrix: np.ndarray, size: tuple[int, int]) -> "DrawnMask":
        """The mask after `cv2.warpAffine`.

        Args:
          matrix: `[2, 3]`, maps centres of pixels.
          size: (height, width) of the new canvas, at which the mask is cut off.
        """
        height, width = self.bitmap.shape
        low, high = np.array([self.left, self.top]) - 0.5, np.array([self.left + width, self.top + height]) - 0.5
        corners = np.array([low, [high[0], low[1]], [low[0], high[1]], high]) @ matrix[:, :2].T + matrix[:, 2]
        left, top, right, bottom = _pixels_around(corners + 0.5, size)
        if right <= left or bottom <= top:
            return EMPTY_MASK
        offset = matrix[:, :2] @ [self.left, self.top] + matrix[:, 2] - [left, top]
        local = np.concatenate([matrix[:, :2], offset[:, None]], axis=1)
        warped = cv2.warpAffine(self.bitmap, local, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
        return DrawnMask(left, top, warped)

    def without(self, patches: Iterable[Patch]) -> "DrawnMask":
        """The part of the mask that lies outside of rectangles."""
        bitmap = self.bitmap.copy()
        for left, top, right, bottom in patches:
            rows = slice(max(top - self.top, 0), max(bottom - self.top, 0))
            bitmap[rows, max(left - self.left, 0) : max(right - self.left, 0)] = 0
        return DrawnMask(self.left, self.top, bitmap)

    def behind(self, cover: np.ndarray) -> "DrawnMask":
        """The part of the mask that `cover`, uint8 of the canvas' size, 1 where it hides what lies below, leaves visible."""
        return DrawnMask(self.left, self.top, self.bitmap & (1 - cover[self.window]))


EMPTY_MASK = DrawnMask(0, 0, np.zeros((0, 0), np.uint8))


def draw_box(box: np.ndarray, size: tuple[int, int]) -> DrawnMask:
    """The mask that fills a box, xyxy `[4]`, rounded to pixels and cut off at a canvas of (height, width) `size`."""
    left, top, right, bottom = _pixels_around(np.rint(box).reshape(2, 2), size)
    return DrawnMask(left, top, np.ones((max(bottom - top, 0), max(right - left, 0)), np.uint8))


def draw_mask(mask: Mask, matrix: np.ndarray, size: tuple[int, int]) -> DrawnMask:
    """Draws an annotated mask.

    Args:
      matrix: `[2, 3]`, maps (x, y) of the annotated image to (x, y) of the canvas. Coordinates are those of edges: a pixel
        reaches from its index to the next.
      size: (height, width) of the canvas, at which the mask is cut off.
    """
    if isinstance(mask, Mapping):
        left, top, width, height = map(int, coco_mask.toBbox(mask))
        drawn = DrawnMask(left, top, coco_mask.decode(mask)[top : top + height, left : left + width])
        return drawn.warp(_between_centres(matrix), size) if drawn.bitmap.size else EMPTY_MASK
    polygons = [polygon @ matrix[:, :2].T + matrix[:, 2] for polygon in mask]
    left, top, right, bottom = _pixels_around(np.concatenate(polygons), size)
    if right <= left or bottom <= top:
        return EMPTY_MASK
    shifted = [(polygon - [left, top]).ravel() for polygon in polygons]
    parts = coco_mask.frPyObjects(shifted, bottom - top, right - left)
    return DrawnMask(left, top, coco_mask.decode(coco_mask.merge(parts)))


def _between_centres(matrix: np.ndarray) -> np.ndarray:
    """Turns a map `[2, 3]` between edges of pixels into the same map between their centres, which OpenCV wants."""
    return np.concatenate([matrix[:, :2], matrix[:, 2:] + 0.5 * matrix[:, :2].sum(axis=1, keepdims=True) - 0.5], axis=1)


def _pixels_around(points: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the whole pixels around points `[k, 2]`, within a canvas of (height, width) `size`."""
    limit = np.array(size[::-1])
    low, high = np.floor(points.min(axis=0)).clip(0, limit), np.ceil(points.max(axis=0)).clip(0, limit)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])
