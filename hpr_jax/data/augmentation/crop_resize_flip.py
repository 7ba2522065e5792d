"""Crop, resize and flip: what maps an image to the network's input.

A `Geometry` is drawn from the size of an image alone, before the image is opened, so that the plan of batches knows every
shape beforehand.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

# The loader has threads or processes of its own, with which OpenCV's would compete.
cv2.setNumThreads(0)

# The level of a canvas where no image covers it, as in the official large-scale jitter.
GREY = 114
# Boxes must be wider and higher than this after a geometry, in pixels; others are dropped.
MIN_BOX_SIDE = 1e-2


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What happens to one image: a window of it is mirrored or not, and resized.

    Attributes:
      window: (left, top, right, bottom) of the part of the image that is used, in pixels.
      size: (height, width) of the result.
      flip: whether the window is mirrored left to right.
      content: (height, width) that the window is resized to, to lie at the top left of a grey canvas of `size`. None: the
        window is resized to `size`, without a canvas.
    """

    window: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False
    content: tuple[int, int] | None = None

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) that the window is resized to."""
        return self.content or self.size

    @property
    def matrix(self) -> np.ndarray:
        """Maps (x, y) of the image to (x, y) of the result, both between edges of pixels: float64 `[2, 3]`."""
        left, top, right, bottom = self.window
        height, width = self.resized
        x, y = width / (right - left), height / (bottom - top)
        if self.flip:
            return np.array([[-x, 0, width + left * x], [0, y, -top * y]])
        return np.array([[x, 0, -left * x], [0, y, -top * y]])


def fit(heights: np.ndarray, widths: np.ndarray, sides: np.ndarray | float, max_side: np.ndarray | float) -> np.ndarray:
    """Resizes in proportion: the shorter side becomes `sides`, unless the longer one would become longer than `max_side`,
    which it then has.

    Args:
      heights, widths: of M images, `[M]`.
      sides, max_side: for all images, or `[M]`.

    Returns:
      (height, width) of the results, at least 1: int64 `[M, 2]`.
    """
    shorter, longer = np.minimum(heights, widths), np.maximum(heights, widths)
    scale = np.minimum(sides / shorter, max_side / longer)
    size = np.stack([heights * scale, widths * scale], axis=-1)
    return np.maximum((size + 0.5).astype(np.int64), 1)


def evaluation_geometries(sizes: np.ndarray, side: int, max_side: int, canvas: int = 0) -> list[Geometry]:
    """Geometries that evaluation and inference apply: the whole image is resized, as `fit` does.

    Args:
      sizes: (height, width) of the images, `[M, 2]`.
      canvas: side of the square grey canvas that the image is put onto; 0: there is none.
    """
    targets = [(int(h), int(w)) for h, w in fit(sizes[:, 0], sizes[:, 1], np.float64(side), max_side)]
    windows = [(0, 0, int(w), int(h)) for h, w in sizes]
    if canvas:
        return [Geometry(window, (canvas, canvas), content=target) for window, target in zip(windows, targets)]
    return [Geometry(window, target) for window, target in zip(windows, targets)]


def draw_weak(sizes: np.ndarray, settings: Mapping[str, Any], rng: np.random.Generator) -> list[Geometry]:
    """Draws DETR's augmentation: flip; then resize, or with probability `crop` resize, crop and resize.

    Args:
      sizes: (height, width) of the images, `[M, 2]`.
      settings: `flip`, `sides`, `max_side`, `crop`, `crop_sides` and `crop_range` of a config's section `augmentation`.
    """
    count = len(sizes)
    heights, widths = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    flip = rng.random(count) < settings["flip"]
    sides = rng.choice(np.array(settings["sides"], np.float64), count)
    crop = rng.random(count) < settings["crop"]
    crop_sides = rng.choice(np.array(settings["crop_sides"], np.float64), count)
    extent, offset = rng.random((count, 2)), rng.random((count, 2))

    # The crop happens on the image at an intermediate scale.
    middle = fit(heights, widths, crop_sides, np.inf).astype(np.float64)
    low, high = settings["crop_range"]
    smallest, largest = np.minimum(middle, low), np.minimum(middle, high)
    size = np.floor(smallest + extent * (largest - smallest + 1)).clip(max=largest)
    start = np.floor(offset * (middle - size + 1))
    scale = np.stack([heights, widths], axis=-1) / middle
    top_left, bottom_right = np.rint(start * scale), np.rint((start + size) * scale)
    bottom_right = np.maximum(bottom_right, top_left + 1)

    top_left = np.where(crop[:, None], top_left, 0).astype(np.int64)
    bottom_right = np.where(crop[:, None], bottom_right, sizes).astype(np.int64)
    used = np.where(crop[:, None], size, sizes)
    targets = fit(used[:, 0], used[:, 1], sides, settings["max_side"])
    return [
        Geometry((int(left), int(top), int(right), int(bottom)), (int(h), int(w)), bool(mirrored))
        for (top, left), (bottom, right), (h, w), mirrored in zip(top_left, bottom_right, targets, flip)
    ]


def draw_large_scale(sizes: np.ndarray, settings: Mapping[str, Any], rng: np.random.Generator) -> list[Geometry]:
    """Draws large-scale jitter (Ghiasi et al. 2021): flip; then the longer side is resized to `lsj.side` times a random
    scale, and the image put onto a grey square of side `lsj.side`, cropped at a random place where it is larger.

    Args:
      sizes: (height, width) of the images, `[M, 2]`.
      settings: `flip`, `lsj.side` and `lsj.scale_range` of a config's section `augmentation`.
    """
    count, side = len(sizes), settings["lsj"]["side"]
    low, high = settings["lsj"]["scale_range"]
    longer = np.floor(side * rng.uniform(low, high, count)).clip(min=1)
    flip, offset = rng.random(count) < settings["flip"], rng.random((count, 2))

    resized = fit(sizes[:, 0], sizes[:, 1], longer, longer).astype(np.float64)
    content = np.minimum(resized, side)
    start = np.floor(offset * (resized - content + 1))
    scale = sizes / resized
    top_left, bottom_right = np.rint(start * scale), np.rint((start + content) * scale)
    top_left = np.minimum(top_left, sizes - 1).astype(np.int64)
    bottom_right = np.clip(bottom_right, top_left + 1, sizes).astype(np.int64)
    return [
        Geometry((int(left), int(top), int(right), int(bottom)), (side, side), bool(mirrored), (int(h), int(w)))
        for (top, left), (bottom, right), (h, w), mirrored in zip(top_left, bottom_right, content, flip)
    ]


def apply_to_image(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The image, uint8 `[h, w, 3]`, after a geometry: uint8 `[*geometry.size, 3]`, in new memory."""
    left, top, right, bottom = geometry.window
    height, width = geometry.resized
    window = image[top:bottom, left:right]
    result = np.empty((*geometry.size, 3), np.uint8)
    # Mirroring is cheaper before the image is resized, since most images become larger.
    window = cv2.flip(window, 1) if geometry.flip else window
    cv2.resize(window, (width, height), result[:height, :width], interpolation=cv2.INTER_LINEAR)
    result[:height, width:] = GREY
    result[height:] = GREY
    return result


def apply_to_boxes(boxes: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Boxes after a geometry.

    Args:
      boxes: xyxy `[n, 4]`, in pixels of the original image.

    Returns:
      The boxes in pixels of the result, clipped to the resized window, float32 xyxy `[n, 4]`, and which of them remain,
      bool `[n]`.
    """
    boxes = move_boxes(boxes, geometry.matrix, geometry.resized)
    return boxes, has_area(boxes)


def move_boxes(boxes: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Moves the corners of boxes, and takes the smallest boxes around them.

    Args:
      boxes: xyxy `[n, 4]` in pixels.
      matrix: `[2, 3]`, maps (x, y).
      size: (height, width) of the result, to which the boxes are clipped.

    Returns:
      float32 xyxy `[n, 4]`.
    """
    corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2) @ matrix[:, :2].T + matrix[:, 2]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=-1)
    return np.clip(boxes, 0, np.array(size[::-1] * 2)).astype(np.float32)


def has_area(boxes: np.ndarray) -> np.ndarray:
    """Which boxes, xyxy `[n, 4]` in pixels, are wide and high enough to be seen: bool `[n]`."""
    return np.all(boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE, axis=1)


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of an image in a planned batch.

    Attributes:
      index: index of the image in the data set.
      geometry: geometry of its weak view.
      seed: seed of everything else that is drawn for the image when it is loaded.
    """

    index: int
    geometry: Geometry
    seed: tuple[int, ...] = ()
