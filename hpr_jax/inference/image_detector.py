"""Detectors for notebooks and scripts: from a checkpoint or config to boxes in three lines.

import hpr_jax
detector = hpr_jax.load("runs/ddq")
result = detector("street.jpg")  # result.boxes, .scores, .labels, .names, .draw()
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from hpr_jax.data.augmentation.crop_resize_flip import Geometry, apply_to_image, evaluation_geometries
from hpr_jax.data.dataset import Classes, Id
from hpr_jax.data.decoding import to_eight_bits
from hpr_jax.data.images import UnreadableImageError, read_image
from hpr_jax.errors import UserError
from hpr_jax.inference.detect import in_image_pixels, make_detect
from hpr_jax.inference.drawing import draw
from hpr_jax.models.detector import Detector
from hpr_jax.types import Outputs

# Sides of padded inputs are multiples of this many pixels, so that images of similar shape share one compiled program.
GRID = 128

ImageLike = np.ndarray | Image.Image | str | Path


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
      image: RGB uint8 `[h, w, 3]`.
      boxes: float32 xyxy `[n, 4]` in pixels of the image.
      scores: float32 `[n]`, between 0 and 1.
      labels: int32 `[n]`, class indices.
      names: the class name of each detection.
      category_ids: the category of each detection, as in the training annotations.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    category_ids: list[Id]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> "Detections":
        """The detections with at least this score."""
        keep = self.scores >= threshold
        where = np.flatnonzero(keep)
        return Detections(
            image=self.image,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            names=[self.names[i] for i in where],
            category_ids=[self.category_ids[i] for i in where],
        )

    def draw(self) -> np.ndarray:
        """The image with boxes, names and scores on it, RGB uint8 `[h, w, 3]`."""
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores)]
        return draw(self.image, self.boxes, self.labels, captions)


class ImageDetector:
    """A detector that takes images of any size, from files or arrays.

    Args:
      module: the Flax module, which notebooks may use directly, too.
      classes: the classes that it was trained on.
      config: its config; the section `evaluate` gives the input size and the number of detections.
    """

    def __init__(self, module: Detector, classes: Classes, config: ConfigDict):
        self.module, self.classes, self.config = module, classes, config
        graph, self._state = nnx.split(module)
        self._detect = make_detect(graph, config.evaluate.detections)
        self._outputs = jax.jit(functools.partial(_all_outputs, graph))

    @overload
    def __call__(self, images: ImageLike, threshold: float = 0.3) -> Detections: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], threshold: float = 0.3) -> list[Detections]: ...

    def __call__(
        self, images: ImageLike | list[Any] | tuple[Any, ...], threshold: float = 0.3
    ) -> Detections | list[Detections]:
        """Detects objects.

        Args:
          images: a path, a Pillow image, an array of uint8 or uint16, RGB `[h, w, 3]` or grey `[h, w]`, or a list or tuple
            of such. Samples of 16 bits become 8 as `config.data.image_bits` says.
          threshold: lowest score of the detections.

        Raises:
          UserError: an image cannot be read, or an array is of another type or shape.
        """
        if isinstance(images, list | tuple):
            return [found.above(threshold) for found in self._detect_all(images)]
        (found,) = self._detect_all([images])
        return found.above(threshold)

    def _detect_all(self, images: Sequence[ImageLike]) -> Iterator[Detections]:
        """What is found in each of some images, whatever its score."""
        for one in images:
            image = as_array(one, self.config.data.image_bits)
            geometry, padded, sizes = self._prepare(image)
            boxes, scores, labels, valid = (a[0] for a in jax.device_get(self._detect(self._state, padded, sizes)))
            boxes = in_image_pixels(boxes, np.array(geometry.resized), np.array(image.shape[:2]))
            yield self._detections(image, boxes, scores, labels, valid)

    def _detections(
        self, image: np.ndarray, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, valid: np.ndarray
    ) -> Detections:
        """The detections of an image out of arrays `[n, ...]`, of which `valid` says what counts."""
        labels = labels[valid]
        return Detections(
            image=image,
            boxes=boxes[valid],
            scores=scores[valid],
            labels=labels,
            names=[self.classes.names[label] for label in labels],
            category_ids=[self.classes.category_ids[label] for label in labels],
        )

    def outputs(self, image: ImageLike) -> Outputs:
        """Everything that the network computes for one image, with a batch axis of 1: predictions of every layer and
        branch, memory, reference boxes, hidden states, attention masks. Boxes are cxcywh, relative to the image."""
        _, padded, sizes = self._prepare(as_array(image, self.config.data.image_bits))
        return self._outputs(self._state, padded, sizes)

    def _prepare(self, image: np.ndarray) -> tuple[Geometry, np.ndarray, np.ndarray]:
        """How an image `[h, w, 3]` is resized, the padded input uint8 `[1, H, W, 3]`, and its valid size int32 `[1, 2]`."""
        settings = self.config.evaluate
        (geometry,) = evaluation_geometries(np.array([image.shape[:2]]), settings.side, settings.max_side, settings.canvas)
        resized = apply_to_image(image, geometry)
        height, width = (-(-side // GRID) * GRID for side in geometry.size)
        padded = np.zeros((1, height, width, 3), np.uint8)
        padded[0, : geometry.size[0], : geometry.size[1]] = resized
        return geometry, padded, np.array([geometry.size], np.int32)


def _all_outputs(graph: nnx.GraphDef, state: nnx.State, images: jax.Array, sizes: jax.Array) -> Outputs:
    detector = nnx.merge(graph, state)
    return detector(detector.normalize(images, sizes), sizes)


def as_array(image: ImageLike, bits: int) -> np.ndarray:
    """The pixels of an image, RGB uint8 `[h, w, 3]`.

    Args:
      bits: number of bits that samples use where they are stored in 16.

    Raises:
      UserError: it cannot be read, or is of another type or shape.
    """
    if isinstance(image, str | Path):
        try:
            return read_image(Path(image).expanduser(), bits)
        except UnreadableImageError as error:
            raise UserError(f"{error}.") from error
    if isinstance(image, Image.Image):
        return _from_pillow(image, bits)
    try:
        array = np.asarray(image)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.dtype.kind == "u" and array.itemsize == 2:
        array = to_eight_bits(array, bits)
    if array.ndim == 2 and array.dtype == np.uint8:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        what = f"an array of {array.dtype} {list(array.shape)}" if array.size else f"of type {type(image).__name__}"
        raise UserError(
            f"An image is a path, a Pillow image, or an array of uint8 or uint16, RGB [h, w, 3] or grey [h, w]; this one is "
            f"{what}."
        )
    return array


def _from_pillow(image: Image.Image, bits: int) -> np.ndarray:
    """The pixels of a Pillow image as a file of it would be read: turned by its EXIF orientation, palettes looked up, grey
    as RGB, colours without their opacity, and of the `bits` bits that samples of 16 use, the upper 8."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return np.repeat(to_eight_bits(np.asarray(image), bits)[..., None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise UserError(f"A Pillow image of mode {image.mode!r} has no range of values; convert it to 'L' or 'RGB'.")
        pixels = np.asarray(image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB"))
    except OSError as error:
        raise UserError(f"The Pillow image cannot be decoded: {error}.") from error
    if 0 in pixels.shape:
        raise UserError("The Pillow image has no pixels.")
    return pixels
