"""Decoding, and geometry that is drawn before any image is opened.

A `Geometry` maps a window of the original image to the network's input: crop, resize, flip. It is drawn from the image's
size alone, so that the plan of batches knows every shape beforehand.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

# Threads come from the loader; OpenCV's own would compete with them.
cv2.setNumThreads(0)


# Of canvases, as in the official large-scale jitter.
GREY = 114
# Boxes that are not wider and higher than this, in pixels, are dropped where geometries are applied.
MIN_BOX_SIDE = 1e-2


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What happens to one image.

    Attributes:
      window: (left, top, right, bottom) of the part that is used, in pixels of the original.
      size: (height, width) of the result.
      flip: mirrored left to right.
      content: (height, width) that the window is resized to, at the top left of a grey canvas of `size`; None: all of it.
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
        """Maps (x, y) of the original to the result: float64 `[2, 3]`."""
        left, top, right, bottom = self.window
        height, width = self.resized
        x, y = width / (right - left), height / (bottom - top)
        if self.flip:
            return np.array([[-x, 0, width + left * x], [0, y, -top * y]])
        return np.array([[x, 0, -left * x], [0, y, -top * y]])


def fit(heights: np.ndarray, widths: np.ndarray, sides: np.ndarray, max_side: float) -> np.ndarray:
    """Sizes with the shorter side `sides`, or the longer one `max_side` where it would become longer: int `[M, 2]`."""
    shorter, longer = np.minimum(heights, widths), np.maximum(heights, widths)
    scale = np.minimum(sides / shorter, max_side / longer)
    size = np.stack([heights * scale, widths * scale], axis=-1)
    return np.maximum((size + 0.5).astype(np.int64), 1)


def whole(sizes: np.ndarray, side: int, max_side: int, canvas: int = 0) -> list[Geometry]:
    """Geometries of evaluation: the whole image, resized, on a square grey canvas of side `canvas` if that is not 0.
    `sizes` is (height, width) `[M, 2]`."""
    targets = [(int(h), int(w)) for h, w in fit(sizes[:, 0], sizes[:, 1], np.float64(side), max_side)]
    windows = [(0, 0, int(w), int(h)) for h, w in sizes]
    if canvas:
        return [Geometry(window, (canvas, canvas), content=target) for window, target in zip(windows, targets)]
    return [Geometry(window, target) for window, target in zip(windows, targets)]


def draw_weak(sizes: np.ndarray, settings: Mapping[str, Any], rng: np.random.Generator) -> list[Geometry]:
    """DETR's augmentation: flip; resize, or with probability `crop`: resize, crop, resize.

    Args:
      sizes: (height, width) `[M, 2]` of the images.
      settings: `flip`, `sides`, `max_side`, `crop`, `crop_sides`, `crop_range` of a config.
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
    """Large-scale jitter (Ghiasi et al. 2021): the longer side becomes `lsj.side` times a random scale; what exceeds a
    square of that side is cropped at a random place, what it lacks is grey; flip.

    Args:
      sizes: (height, width) `[M, 2]` of the images.
      settings: `flip`, `lsj.side`, `lsj.scale_range` of a config.
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


def apply(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Applies a geometry.

    Args:
      image: uint8 `[h, w, 3]`.
      boxes: xyxy `[n, 4]` in pixels; labels: `[n]`.

    Returns:
      The new image, and the boxes and labels of what remains in it, clipped to it.
    """
    boxes, remains = apply_to_boxes(boxes, geometry)
    return apply_to_image(image, geometry), boxes[remains], labels[remains]


def apply_to_image(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The image, uint8 `[h, w, 3]`, after a geometry: new memory."""
    left, top, right, bottom = geometry.window
    height, width = geometry.resized
    window = image[top:bottom, left:right]
    result = np.empty((*geometry.size, 3), np.uint8)
    # Flipped before resizing, since that is the smaller image as a rule.
    window = cv2.flip(window, 1) if geometry.flip else window
    cv2.resize(window, (width, height), result[:height, :width], interpolation=cv2.INTER_LINEAR)
    result[:height, width:] = GREY
    result[height:] = GREY
    return result


def apply_to_boxes(boxes: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Boxes, xyxy `[n, 4]`, after a geometry, clipped to it, and which of them remain, bool `[n]`."""
    boxes = move_boxes(boxes, geometry.matrix, geometry.resized)
    return boxes, has_area(boxes)


def move_boxes(boxes: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The boxes around the corners of xyxy boxes `[n, 4]` moved by `matrix` `[2, 3]`, clipped to (height, width) `size`."""
    corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2) @ matrix[:, :2].T + matrix[:, 2]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=-1)
    return np.clip(boxes, 0, np.array(size[::-1] * 2)).astype(np.float32)


def has_area(boxes: np.ndarray) -> np.ndarray:
    """Which boxes, xyxy `[n, 4]`, are wide and high enough to be seen: bool `[n]`."""
    return np.all(boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE, axis=1)


@dataclasses.dataclass(frozen=True)
class Slot:
    """One image of a batch.

    Attributes:
      index: in the data set.
      geometry: of the weak view.
      seed: of everything else that is drawn for the image.
    """

    index: int
    geometry: Geometry
    seed: tuple[int, ...] = ()
