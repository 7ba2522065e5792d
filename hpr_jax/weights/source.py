"""What a detector is loaded from: a checkpoint of this project, a published folder, or a file of published weights."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hpr_jax.config import load_config, override
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector, random_detector
from hpr_jax.models.detector import Detector
from hpr_jax.settings import check
from hpr_jax.weights.checkpoint import checkpoint_config, load_detector, read_meta
from hpr_jax.weights.classes import guess_classes
from hpr_jax.weights.find_checkpoint import find_checkpoint
from hpr_jax.weights.hub import local_path
from hpr_jax.weights.official import load_official
from hpr_jax.weights.published import Published
from hpr_jax.weights.published_folder import is_published_folder, published_in_file, read_published_folder
from hpr_jax.weights.recognize import CLASS_LAYER, recognize
from hpr_jax.weights.weights_file import read_weights

# The file that describes exported programs; `hpr_jax.inference.export_format` reads it.
EXPORT = "export.json"
# How the names of ONNX files end.
ONNX_SUFFIX = ".onnx"


@dataclasses.dataclass(frozen=True)
class Source:
    """A detector on disk.

    Attributes:
      path: the checkpoint, the folder or the file.
      classes: the classes that it was trained on.
      config: its config, with overrides.
      step: training steps, 0 if it is not known.
      metrics: of the evaluation at this step, if one is known.
      build: reads the weights, into a detector that computes as a section `compute` says; None takes the defaults.
    """

    path: Path
    classes: Classes
    config: ConfigDict
    step: int
    metrics: dict[str, float]
    build: Callable[[Mapping[str, Any] | None], Detector]

    def load(self) -> Detector:
        """The detector, which computes as its config says."""
        return self.build(self.config.compute)


def open_source(place: str | Path, overrides: Sequence[tuple[str, str]] = (), config: ConfigDict | None = None) -> Source:
    """Looks at what is at a place.

    Args:
      place: a checkpoint as `find_checkpoint` takes it; a folder as `published_folder` writes it, or the name of such a one
        on the Hugging Face hub, `hf://owner/name`; or a `.pth`, `.npz` or `.safetensors` file of an official detector, or
        of one of mmdetection's that HPR builds on.
      overrides: settings (dotted key, text) in place of the detector's.
      config: in place of the detector's; its model must be the same.

    Raises:
      UserError: there is no detector, or it is none that is known here, or a setting is wrong.
    """
    path = local_path(place)
    if is_exported(path):
        raise UserError(
            f"{path} holds exported programs, which hpr_jax.load and predict take; here goes the detector they were made of."
        )
    if path.is_file():
        return _open_file(path, overrides, config)
    if is_published_folder(path):
        found = read_published_folder(path)
        if isinstance(found, Published):
            return _open_published(found, overrides, config)
        return _open_tensors(path, *found, overrides, config)
    meta = read_meta(path)
    config = checkpoint_config(meta, overrides, config)
    return Source(
        find_checkpoint(path), meta.classes, config, meta.step, meta.metrics, lambda compute: load_detector(path, compute)[0]
    )


def is_exported(path: Path) -> bool:
    """Whether a folder holds a detector whose programs were exported, or a file is such a program that stands alone."""
    return (path / EXPORT).is_file() or (path.suffix == ONNX_SUFFIX and path.is_file())


def random_source(
    config: str, overrides: Sequence[tuple[str, str]] = (), class_names: Sequence[str] | None = None, seed: int = 0
) -> Source:
    """A detector with random weights.

    Args:
      config: `path.py[:variant]` of its config.
      overrides: settings (dotted key, text) in place of the config's.
      class_names: 80 numbered classes by default.
      seed: of the weights.

    Raises:
      UserError: there is no such config, or a setting is wrong.
    """
    settings = load_config(config, overrides)
    names = tuple(class_names or (f"class {number}" for number in range(80)))
    check(settings)

    def build(compute: Mapping[str, Any] | None) -> Detector:
        return random_detector(settings.model, len(names), compute=compute, seed=seed)

    classes = Classes(names, tuple(range(1, len(names) + 1)))
    return Source(Path(config), classes, settings, 0, {}, build)


def _open_published(published: Published, overrides: Sequence[tuple[str, str]], config: ConfigDict | None) -> Source:
    meta = published.meta
    config = checkpoint_config(meta, overrides, config)
    return Source(published.path, meta.classes, config, meta.step, meta.metrics, published.build)


def _open_file(path: Path, overrides: Sequence[tuple[str, str]], config: ConfigDict | None) -> Source:
    tensors, meta = read_weights(path)
    published = published_in_file(path, tensors, meta)
    if published:
        return _open_published(published, overrides, config)
    return _open_tensors(path, tensors, meta, overrides, config)


def _open_tensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]],
    config: ConfigDict | None,
) -> Source:
    """A detector of another project, of which a file or folder holds tensors with official names."""
    if config is None:
        config = recognize(tensors, meta, str(path), overrides)
    else:
        for key, text in overrides:
            override(config, key, text)
    check(config)
    classes, step = guess_classes(meta, len(tensors.get(CLASS_LAYER, ()))), meta.get("iter")

    def build(compute: Mapping[str, Any] | None) -> Detector:
        detector = abstract_detector(config.model, len(classes.names), compute)
        load_official(detector, tensors)
        return detector

    return Source(path, classes, config, step if isinstance(step, int) and step >= 0 else 0, {}, build)
