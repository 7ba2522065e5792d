"""Detectors for notebooks and scripts: from a checkpoint or config to boxes in three lines.

import hpr_jax
detector = hpr_jax.load("runs/ddq")
result = detector("street.jpg")  # result.boxes, .scores, .labels, .names, .draw()
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.config import load_config
from hpr_jax.data.augmentation.crop_resize_flip import Geometry, apply_to_image, evaluation_geometries
from hpr_jax.data.dataset import Classes
from hpr_jax.inference.detect import make_detect
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.explanation import Explanation, explain
from hpr_jax.inference.pixels import ImageLike, as_array
from hpr_jax.inference.tiles import Tiling, detect_in_tiles
from hpr_jax.models.build import random_detector
from hpr_jax.models.detector import Detector
from hpr_jax.runtime.compilation_cache import enable_compilation_cache
from hpr_jax.settings import check
from hpr_jax.types import Outputs
from hpr_jax.weights.source import open_source

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
        bits = self.config.data.image_bits
        if not isinstance(images, list | tuple):
            (found,) = self._detect_batch([as_array(images, bits)])
            return found.above(threshold)
        arrays = [as_array(image, bits) for image in images]
        found_by_place: dict[int, Detections] = {}
        for places in self._batches(arrays):
            found_by_place |= zip(places, self._detect_batch([arrays[place] for place in places]))
        return [found_by_place[place].above(threshold) for place in range(len(arrays))]

    def _batches(self, images: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Places of images that go into one batch: they are padded to the same shape."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for place, image in enumerate(images):
            by_shape.setdefault(_padded_shape(self._geometry(image)), []).append(place)
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
        found = jax.device_get(self._detect(self._state, padded, sizes))
        return [
            self._detections(image, geometry, *(array[place] for array in found))
            for place, (image, (geometry, _, _)) in enumerate(zip(images, prepared))
        ]

    def _detections(
        self,
        image: np.ndarray,
        geometry: Geometry,
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        valid: np.ndarray,
    ) -> Detections:
        """What `make_detect` has found in one image, in pixels of that image."""
        height, width = image.shape[:2]
        scale = np.array([width / geometry.resized[1], height / geometry.resized[0]] * 2)
        names, ids = self.classes.names, self.classes.category_ids
        return Detections(
            image=image,
            # On a canvas larger than the image, boxes may reach beyond the image.
            boxes=np.clip(boxes[valid] * scale, 0, [width, height] * 2).astype(np.float32),
            scores=scores[valid],
            labels=labels[valid],
            names=[names[label] for label in labels[valid]],
            category_ids=[ids[label] for label in labels[valid]],
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

    def _geometry(self, image: np.ndarray) -> Geometry:
        """How an image `[h, w, 3]` is resized."""
        settings = self.config.evaluate
        (geometry,) = evaluation_geometries(np.array([image.shape[:2]]), settings.side, settings.max_side, settings.canvas)
        return geometry

    def _prepare(self, image: np.ndarray) -> tuple[Geometry, np.ndarray, np.ndarray]:
        """How an image `[h, w, 3]` is resized, the padded input uint8 `[1, H, W, 3]`, and its valid size int32 `[1, 2]`."""
        geometry = self._geometry(image)
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


def load(
    source: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    overrides: Mapping[str, object] | None = None,
    config: ConfigDict | None = None,
) -> ImageDetector:
    """Loads a detector from a checkpoint or published weights, or makes one with random weights from a config.

    Args:
      source: a run's workdir, a checkpoint's directory, a folder that `convert --publish` wrote, `hf://owner/name` of one
        on the Hugging Face hub, a `.pth`, `.npz` or `.safetensors` file of an official detector or of mmdetection's DINO or
        DDQ, or `path.py[:variant]` of a config.
      class_names: with a config, the names of the classes; 80 numbered classes by default.
      seed: with a config, the seed of the random weights.
      overrides: settings by dotted key, e.g. `{"evaluate.side": 640}`.
      config: with a checkpoint, taken in place of its own config; the model must be the same.

    Raises:
      UserError: there is nothing to load at `source`, or a setting does not exist.
    """
    # In a notebook the next start finds the programs of this one.
    enable_compilation_cache()
    settings = [(key, value if isinstance(value, str) else repr(value)) for key, value in (overrides or {}).items()]
    if str(source).partition(":")[0].endswith(".py"):
        config = load_config(str(source), settings)
        names = tuple(class_names or (f"class {number}" for number in range(80)))
        classes = Classes(names, tuple(range(1, len(names) + 1)))
        check(config)
        module = random_detector(config.model, len(names), compute=config.compute, seed=seed)
        return ImageDetector(module, classes, config)
    found = open_source(source, settings, config)
    return ImageDetector(found.load(), found.classes, found.config)
