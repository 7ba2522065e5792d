"""What a detector is loaded from: a checkpoint of this project, or a file of published weights."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hpr_jax.config import override
from hpr_jax.data.dataset import Classes
from hpr_jax.models.build import abstract_detector
from hpr_jax.models.detector import Detector
from hpr_jax.settings import check
from hpr_jax.weights.checkpoint import checkpoint_config, load_detector, read_meta
from hpr_jax.weights.classes import guess_classes
from hpr_jax.weights.find_checkpoint import find_checkpoint
from hpr_jax.weights.official import load_official
from hpr_jax.weights.recognize import CLASS_LAYER, recognize
from hpr_jax.weights.weights_file import read_weights


@dataclasses.dataclass(frozen=True)
class Source:
    """A detector on disk.

    Attributes:
      path: the checkpoint or the file.
      classes: the classes that it was trained on.
      config: its config, with overrides.
      step: training steps, 0 if it is not known.
      load: reads the weights.
    """

    path: Path
    classes: Classes
    config: ConfigDict
    step: int
    load: Callable[[], Detector]


def open_source(path: Path, overrides: Sequence[tuple[str, str]] = (), config: ConfigDict | None = None) -> Source:
    """Looks at what is at a path.

    Args:
      path: a checkpoint as `find_checkpoint` takes it; or a `.pth` or `.npz` file of an official detector, or of one of
        mmdetection's that HPR builds on.
      overrides: settings (dotted key, text) in place of the detector's.
      config: in place of the detector's; its model must be the same.

    Raises:
      UserError: there is no detector, or it is none that is known here, or a setting is wrong.
    """
    path = path.expanduser()
    if path.is_file():
        return _open_file(path, overrides, config)
    meta = read_meta(path)
    config = checkpoint_config(meta, overrides, config)
    return Source(find_checkpoint(path), meta.classes, config, meta.step, lambda: load_detector(path, config.compute)[0])


def _open_file(path: Path, overrides: Sequence[tuple[str, str]], config: ConfigDict | None) -> Source:
    tensors, meta = read_weights(path)
    if config is None:
        config = recognize(tensors, meta, str(path), overrides)
    else:
        for key, text in overrides:
            override(config, key, text)
    check(config)
    classes, step = guess_classes(meta, len(tensors.get(CLASS_LAYER, ()))), meta.get("iter")

    def load() -> Detector:
        detector = abstract_detector(config.model, len(classes.names), config.compute)
        load_official(detector, tensors)
        return detector

    return Source(path, classes, config, step if isinstance(step, int) and step >= 0 else 0, load)
