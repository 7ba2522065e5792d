"""Weights to start from, out of whichever file holds them."""

import logging
import re
import zipfile
from pathlib import Path

import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.detector import Detector
from hpr_jax.weights.backbone_names import OUTPUT_NORMS, as_official_backbone, is_detector
from hpr_jax.weights.checkpoint import load_detector
from hpr_jax.weights.official import compare_shapes, dotted_path, load_official, of_classes
from hpr_jax.weights.torch_file import find_tensors, read_checkpoint

log = logging.getLogger("hpr_jax")


def load_initial_weights(detector: Detector, path: Path) -> None:
    """Fills the detector, in place, or its backbone alone.

    Weights that depend on the number of classes (class layers, label embedding of the denoising queries) may be of another
    number; they then stay as they are, and the log names them.

    Args:
      path: a checkpoint or workdir of this project; or a `.pth` or `.npz` file with official names of a whole detector, or
        of a backbone in any naming of `backbone_names`.

    Raises:
      UserError: no such file, or weights that do not fit. Nothing is changed then.
    """
    if not path.exists():
        raise UserError(f"The weights {path} do not exist; set config.train.initial_weights.")
    kept = (_from_checkpoint if path.is_dir() else _from_file)(detector, path)
    if kept:
        log.warning(
            "%s is of another number of classes; %d weights start anew: %s", path, len(kept), ", ".join(_summary(kept))
        )


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth` or `.npz` file, by name.

    Raises:
      UserError: it is neither.
    """
    if path.suffix != ".npz":
        return find_tensors(read_checkpoint(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"The weight file {path} is not an .npz file of arrays: {error}") from error


def _from_file(detector: Detector, path: Path) -> list[str]:
    tensors = read_tensors(path)
    if is_detector(tensors):
        return load_official(detector, tensors, other_classes=True)
    log.info("%s holds a backbone; the rest of the detector starts at random.", path)
    return load_official(detector, as_official_backbone(tensors, str(path)), only="backbone.", optional=OUTPUT_NORMS)


def _from_checkpoint(detector: Detector, path: Path) -> list[str]:
    source, _ = load_detector(path)
    theirs = {dotted_path(path): variable for path, variable in nnx.to_flat_state(nnx.state(source))}
    flat = {dotted_path(path): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(detector))}
    expected = {name: (variable.shape, of_classes(name)) for name, (_, variable) in flat.items()}
    kept = compare_shapes(expected, {name: variable.shape for name, variable in theirs.items()}, other_classes=True)
    loaded = [
        (path, variable.replace(theirs[name].get_value())) for name, (path, variable) in flat.items() if name not in kept
    ]
    nnx.update(detector, nnx.from_flat_state(loaded))
    return kept


def _summary(names: list[str]) -> list[str]:
    """`a.0.weight, a.1.weight, b` -> `a.*.weight, b`."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
