"""Decoding, and geometry that is drawn before any image is opened.

A `Geometry` maps a window of the original image to the network's input: crop, resize, flip. It is drawn from the image's
size alone, so that the plan of batches knows every shape beforehand.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# Threads come from the loader; OpenCV's own would compete with them.
cv2.setNumThreads(0)


# Of canvases, as in the official large-scale jitter.
GREY = 114


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


class UnreadableImageError(Exception):
    """An image file that is missing, broken, or not the one that was annotated."""


def read_image(path: Path) -> np.ndarray:
    """Decodes a file to RGB uint8 `[h, w, 3]`, turned as its EXIF orientation says.

    Raises:
      UnreadableImageError: the file is missing or not an image.
    """
    return _decode(path, cv2.IMREAD_COLOR_RGB)


def read_annotated_image(path: Path, height: int, width: int) -> np.ndarray:
    """Like `read_image`, in the orientation that the annotations refer to.

    Raises:
      UnreadableImageError: also when neither orientation has the annotated size.
    """
    image = _decode(path, cv2.IMREAD_COLOR_RGB)
    if image.shape[:2] != (height, width):
        # Some data sets are annotated on the pixels as stored, without the EXIF rotation.
        stored = _decode(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if stored.shape[:2] != (height, width):
            raise UnreadableImageError(
                f"{path} is {image.shape[1]}x{image.shape[0]} pixels, its annotation says {width}x{height}"
            )
        return stored
    return image


def _decode(path: Path, flags: int) -> np.ndarray:
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UnreadableImageError(f"{path}: {error.strerror}") from error
    try:
        image = cv2.imdecode(data, flags) if len(data) else None
    except cv2.error:
        image = None
    if image is None:
        raise UnreadableImageError(f"{path} is not an image that can be decoded")
    return image


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
    left, top, right, bottom = geometry.window
    height, width = geometry.resized
    image = cv2.resize(image[top:bottom, left:right], (width, height), interpolation=cv2.INTER_LINEAR)
    scale = np.array([width / (right - left), height / (bottom - top)] * 2, np.float32)
    boxes = (boxes - np.array([left, top] * 2, np.float32)) * scale
    if geometry.flip:
        image = image[:, ::-1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=-1)
    boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32)).astype(np.float32)
    remains = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if geometry.content is not None:
        canvas = np.full((*geometry.size, 3), GREY, np.uint8)
        canvas[:height, :width] = image
        image = canvas
    return image, boxes[remains], labels[remains]
