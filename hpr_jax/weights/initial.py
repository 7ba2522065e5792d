"""Loads the weights that training starts from, out of any kind of file that holds them."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.detector import Detector
from hpr_jax.weights.backbone_names import OUTPUT_NORMS, as_official_backbone, is_detector
from hpr_jax.weights.checkpoint import load_detector
from hpr_jax.weights.grow import begin_as_plain, is_added
from hpr_jax.weights.official import compare_shapes, load_official
from hpr_jax.weights.official_names import depends_on_classes, dotted_path
from hpr_jax.weights.published import Published
from hpr_jax.weights.published_folder import is_published_folder, published_in_file, read_published_folder
from hpr_jax.weights.weights_file import read_weights

log = logging.getLogger("hpr_jax")


def load_initial_weights(detector: Detector, path: Path) -> None:
    """Fills the detector in place: all of it, or the backbone alone if the file holds no more.

    The file may be made for another number of classes. The weights whose shape depends on it (class layers, label embedding
    of the denoising queries) then stay as they are, and the log names them.

    Args:
      path: a checkpoint, workdir or published folder of this project; or a `.pth`, `.npz` or `.safetensors` file, either of
        a complete detector, or of a backbone in any naming that `backbone_names.py` knows. An HPR detector takes weights of
        a plain one, too, see `begin_as_plain`.

    Raises:
      UserError: the file does not exist, or its weights do not fit. The detector is unchanged then.
    """
    if not path.exists():
        raise UserError(f"The weights {path} do not exist; set config.train.initial_weights.")
    if is_published_folder(path):
        found = read_published_folder(path)
        if isinstance(found, Published):
            not_loaded = _from_detector(detector, found.build(), path)
        else:
            not_loaded = _from_tensors(detector, found[0], path)
    elif path.is_dir():
        not_loaded = _from_detector(detector, load_detector(path)[0], path)
    else:
        not_loaded = _from_file(detector, path)
    if not_loaded:
        names = ", ".join(_summary(not_loaded))
        log.warning("%s is made for another number of classes; %d weights start anew: %s", path, len(not_loaded), names)


def _from_file(detector: Detector, path: Path) -> list[str]:
    """Fills the detector from a file; returns the names of the weights that were not loaded."""
    tensors, meta = read_weights(path)
    published = published_in_file(path, tensors, meta)
    if published:
        return _from_detector(detector, published.build(), path)
    return _from_tensors(detector, tensors, path)


def _from_tensors(detector: Detector, tensors: Mapping[str, np.ndarray], path: Path) -> list[str]:
    """Fills the detector with tensors of a whole detector with official names, or of a backbone; returns the names of the
    weights that were not loaded."""
    if is_detector(tensors):
        grows = bool(detector.refiner.branches) and not any(name.startswith("bbox_head_aux.") for name in tensors)
        not_loaded = load_official(detector, tensors, other_classes=True, without=is_added if grows else None)
        if grows:
            begin_as_plain(detector, path)
        return not_loaded
    log.info("%s holds a backbone; the rest of the detector starts at random.", path)
    return load_official(detector, as_official_backbone(tensors, str(path)), only="backbone.", optional=OUTPUT_NORMS)


def _from_detector(detector: Detector, source: Detector, path: Path) -> list[str]:
    """Fills the detector from another one, which was read from `path`; returns the names of the variables that were not
    loaded."""
    given = {dotted_path(path): variable for path, variable in nnx.to_flat_state(nnx.state(source))}
    own = {dotted_path(path): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(detector))}
    grows = bool(detector.refiner.branches) and not source.refiner.branches
    if grows:
        own = {name: entry for name, entry in own.items() if not is_added(name)}
    expected = {name: (variable.shape, depends_on_classes(name)) for name, (_, variable) in own.items()}
    not_loaded = compare_shapes(expected, {name: variable.shape for name, variable in given.items()}, other_classes=True)
    loaded = [
        (key, variable.replace(given[name].get_value())) for name, (key, variable) in own.items() if name not in not_loaded
    ]
    nnx.update(detector, nnx.from_flat_state(loaded))
    if grows:
        begin_as_plain(detector, path)
    return not_loaded


def _summary(names: list[str]) -> list[str]:
    """The names, with those that differ in numbers alone joined: `a.0.weight, a.1.weight, b` -> `a.*.weight, b`."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
