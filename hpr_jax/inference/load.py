"""Loads a detector from wherever it is, in one line.

import hpr_jax
detector = hpr_jax.load("runs/ddq")
result = detector("street.jpg")  # result.boxes, .scores, .labels, .names, .draw()
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hpr_jax.config import as_overrides
from hpr_jax.errors import UserError
from hpr_jax.inference.exported import ExportedDetector
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.runtime.compilation_cache import enable_compilation_cache
from hpr_jax.weights.hub import is_hub
from hpr_jax.weights.source import is_exported, open_source, random_source


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
      source: a run's workdir, a checkpoint's directory, a folder that `convert --publish` or `export` wrote, an `.onnx`
        file that `export` wrote, `hf://owner/name` of a published folder on the Hugging Face hub, a `.pth`, `.npz` or
        `.safetensors` file of a detector of the official code, mmdetection, detrex or Hugging Face, or `path.py[:variant]`
        of a config.
      class_names: with a config, the names of the classes; 80 numbered classes by default.
      seed: with a config, the seed of the random weights.
      overrides: settings by dotted key, e.g. `{"evaluate.side": 640}`.
      config: with a checkpoint, taken in place of its own config; the model must be the same.

    Raises:
      UserError: there is nothing to load at `source`, or a setting does not exist.
    """
    # In a notebook the next start finds the programs of this one.
    enable_compilation_cache()
    settings = as_overrides(overrides)
    if str(source).partition(":")[0].endswith(".py"):
        found = random_source(str(source), settings, class_names, seed)
    elif not is_hub(source) and is_exported(Path(source).expanduser()):
        if settings or config is not None:
            raise UserError(
                f"The settings of {source} were chosen when it was exported; leave them out, or export it again."
            )
        return ExportedDetector(Path(source).expanduser())
    else:
        found = open_source(source, settings, config)
    return ImageDetector(found.load(), found.classes, found.config)
