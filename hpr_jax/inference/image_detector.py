"""Detectors for notebooks and scripts: from a checkpoint or config to boxes in three lines.

import hpr_jax
detector = hpr_jax.load("runs/ddq")
result = detector("street.jpg")  # result.boxes, .scores, .labels, .names, .draw()
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.data.augmentation.crop_resize_flip import Geometry, apply_to_image, evaluation_geometries
from hpr_jax.data.dataset import Classes
from hpr_jax.inference.branches import TopQueries, top_queries
from hpr_jax.inference.detect import in_image_pixels, make_detect
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.explanation import Explanation, explain
from hpr_jax.inference.pixels import ImageLike, as_array
from hpr_jax.inference.tiles import Tiling, detect_in_tiles
from hpr_jax.models.detector import Detector
from hpr_jax.types import Outputs

# Sides of padded inputs are multiples of this many pixels, so that images of similar shape share one compiled program.
GRID = 128


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
          images: a path, the bytes of an image file, a Pillow image, an array of uint8 or uint16, RGB `[h, w, 3]` or grey
            `[h, w]`, or a list or tuple of such. Samples of 16 bits become 8 as `config.data.image_bits` says. A list runs
            in batches of `config.evaluate.batch_size` images, which find what each image alone would.
          threshold: lowest score of the detections.

        Raises:
          UserError: an image cannot be read, or an array is of another type or shape.
        """
        several = images if isinstance(images, list | tuple) else [images]
        found = self._detect_all([as_array(image, self.config.data.image_bits) for image in several])
        if isinstance(images, list | tuple):
            return [one.above(threshold) for one in found]
        return found[0].above(threshold)

    def _detect_all(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """What is found in each of some images `[h, w, 3]`, whatever its score."""
        found: dict[int, Detections] = {}
        for places in self._batches(images):
            found |= zip(places, self._detect_batch([images[place] for place in places]))
        return [found[place] for place in range(len(images))]

    def _batches(self, images: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Places of images that go into one batch: they are padded to the same shape."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for place, image in enumerate(images):
            by_shape.setdefault(self.input_shape(image), []).append(place)
        size = self.config.evaluate.batch_size
        for places in by_shape.values():
            yield from (places[start : start + size] for start in range(0, len(places), size))

    def _detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """What is found in images `[h, w, 3]` that are padded to the same shape.

        A batch of several images that is not full is filled up with its first image, so that a shape has two programs: for a
        single image, and for a full batch.
        """
        full = 1 if len(images) == 1 else self.config.evaluate.batch_size
        prepared = [self._prepare(image) for image in images]
        filled = [*prepared, *([prepared[0]] * (full - len(prepared)))]
        padded, sizes = (np.concatenate(arrays) for arrays in list(zip(*filled))[1:])
        boxes, *others = jax.device_get(self._detect(self._state, padded, sizes))
        found = []
        for place, (image, (geometry, _, _)) in enumerate(zip(images, prepared)):
            moved = in_image_pixels(boxes[place], np.array(geometry.resized), np.array(image.shape[:2]))
            found.append(self._detections(image, moved, *(array[place] for array in others)))
        return found

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

    def in_tiles(self, image: ImageLike, tiling: Tiling, threshold: float = 0.3) -> Detections:
        """Detects objects in a picture that is too large for one look, tile by tile. Arguments and errors are those of a
        call; all tiles run in one compiled shape."""
        array = as_array(image, self.config.data.image_bits)
        return detect_in_tiles(self, array, tiling, threshold, batch_size=self.config.evaluate.batch_size)

    def prepared_batch(self, image: np.ndarray, count: int) -> Callable[[], object]:
        """What detects objects in so many copies of an image at once, and waits for the result; the copies, RGB uint8
        `[h, w, 3]` each, are prepared and on the device already."""
        _, padded, sizes = self._prepare(image)
        images, sizes = (jax.device_put(np.repeat(array, count, axis=0)) for array in (padded, sizes))
        return lambda: jax.block_until_ready(self._detect(self._state, images, sizes))

    def outputs(self, image: ImageLike) -> Outputs:
        """Everything that the network computes for one image, with a batch axis of 1: predictions of every layer and
        branch, memory, reference boxes, hidden states, attention masks. Boxes are cxcywh, relative to the image."""
        _, padded, sizes = self._prepare(as_array(image, self.config.data.image_bits))
        return self._outputs(self._state, padded, sizes)

    def explain(self, image: ImageLike, query: int | None = None) -> Explanation:
        """How one query comes to its box, layer by layer: where it samples the image, and what each branch predicts.

        Args:
          image: as for a call.
          query: number of a matching query; None for the one of the best detection.

        Raises:
          UserError: the image cannot be read, there is no such query, or the primary refiner does not sample.
        """
        array = as_array(image, self.config.data.image_bits)
        geometry, padded, sizes = self._prepare(array)
        return explain(self.module, array, geometry.resized, padded, sizes, query, self.classes.names)

    def branches(self, image: ImageLike, count: int = 10) -> dict[str, list[TopQueries]]:
        """What each refiner contributes: the best matching queries of each branch behind each layer, by the name of the
        branch's refiner, `primary` first.

        Args:
          image: as for a call.
          count: how many queries of each.

        Raises:
          UserError: the image cannot be read.
        """
        array = as_array(image, self.config.data.image_bits)
        geometry, padded, sizes = self._prepare(array)
        # Normalised to what is valid of the padded input -> pixels of the image.
        size = np.array(array.shape[1::-1], np.float32)
        scale = sizes[0][::-1] * size / np.array(geometry.resized[::-1], np.float32)
        outputs = self._outputs(self._state, padded, sizes)
        return top_queries(outputs, tuple(self.module.refiner.branches), count, scale, size, self.classes.names)

    def input_shape(self, image: np.ndarray) -> tuple[int, int]:
        """The (height, width) of the padded input that an image `[h, w, 3]` becomes. Images that share it share batches.

        Raises:
          UserError: the detector takes no such image; exported ones have few shapes.
        """
        return _padded_shape(self._geometry(image.shape[:2]))

    def _geometry(self, size: tuple[int, ...]) -> Geometry:
        """How an image of a size (height, width) is resized."""
        settings = self.config.evaluate
        (geometry,) = evaluation_geometries(np.array([size]), settings.side, settings.max_side, settings.canvas)
        return geometry

    def _prepare(self, image: np.ndarray) -> tuple[Geometry, np.ndarray, np.ndarray]:
        """How an image `[h, w, 3]` is resized, the padded input uint8 `[1, H, W, 3]`, and its valid size int32 `[1, 2]`."""
        geometry = self._geometry(image.shape[:2])
        resized = apply_to_image(image, geometry)
        padded = np.zeros((1, *_padded_shape(geometry), 3), np.uint8)
        padded[0, : geometry.size[0], : geometry.size[1]] = resized
        return geometry, padded, np.array([geometry.size], np.int32)


def _padded_shape(geometry: Geometry) -> tuple[int, int]:
    """(height, width) to which an image is padded."""
    height, width = (-(-side // GRID) * GRID for side in geometry.size)
    return height, width


def _all_outputs(graph: nnx.GraphDef, state: nnx.State, images: jax.Array, sizes: jax.Array) -> Outputs:
    detector = nnx.merge(graph, state)
    return detector(detector.normalize(images, sizes), sizes)
