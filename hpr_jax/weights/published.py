"""The form in which detectors are published: tensors under names that others know, and a description beside them.

The description is JSON: config, classes, training steps, metrics. The tensors have the official names and PyTorch's layout
where the official models have all parts of the detector, else our own names and layout; texts beside the tensors say which.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.config import from_plain
from hpr_jax.errors import UserError, shown
from hpr_jax.models.build import abstract_detector
from hpr_jax.models.detector import Detector
from hpr_jax.settings import check
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.official import compare_shapes, foreign_part, load_official, official_buffers, to_official
from hpr_jax.weights.official_names import dotted_path

# The mark by which a description is known to be one of this project's, and the version of its form.
MARK, VERSION = "hpr_jax", 1
# Keys of the texts beside the tensors: version of the form, naming of the tensors, and in files that stand alone the
# description.
VERSION_TEXT, NAMES_TEXT, DESCRIPTION_TEXT = "hpr_jax_version", "hpr_jax_names", "hpr_jax_description"
# The two namings, and the word by which other libraries know the layout of the tensors.
OFFICIAL, OWN = "official", "own"
_LAYOUTS = {OFFICIAL: "pt", OWN: "flax"}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published detector as it was read.

    Attributes:
      path: the file or the folder.
      meta: its description.
      tensors: by name.
      texts: what stands beside the tensors.
    """

    path: Path
    meta: Meta
    tensors: Mapping[str, np.ndarray]
    texts: Mapping[str, Any]

    def build(self, compute: Mapping[str, Any] | None = None) -> Detector:
        """The detector with its weights.

        Args:
          compute: how it shall compute, a section `compute`; None takes the defaults.

        Raises:
          UserError: no detector can have the config, or the weights do not fit it.
        """
        names = self.texts.get(NAMES_TEXT, OFFICIAL)
        if names not in _LAYOUTS:
            raise UserError(
                f"The tensors of {self.path} have names of the kind {shown(names)}; known are {OFFICIAL}, {OWN}."
            )
        model = from_plain(self.meta.config).model
        _check_size(model, self)
        with explained(self.path):
            detector = abstract_detector(model, len(self.meta.classes.names), compute)
        (load_official if names == OFFICIAL else load_own)(detector, self.tensors)
        return detector


def _check_size(model: ConfigDict, published: Published) -> None:
    """Checks that a detector has no more parts than there are tensors for: each part takes time to make.

    Raises:
      UserError: it has.
    """
    parts = sum(model.backbone.get("blocks", ())) + model.levels
    if parts > len(published.tensors):
        raise UserError(
            f"The config of {published.path} has {parts} residual blocks and levels, and its file {len(published.tensors)} "
            "tensors; they belong to different detectors."
        )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """A context that reads a stranger's config, of which anything may be missing or of another kind.

    Raises:
      UserError: in place of whatever that raises.
    """
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"The config of {path} is of no detector of this version: {_one_line(error)} is missing.") from error
    except Exception as error:
        raise UserError(
            f"The config of {path} is of no detector of this version: a setting or a section is missing or of another kind."
        ) from error


def _one_line(error: KeyError) -> str:
    """The key that is missing, fit for a sentence; ConfigDict puts lines of advice behind it."""
    return shown(str(error.args[0]).partition("\n")[0]) if error.args else "a setting"


def description(meta: Meta) -> str:
    """The description of a detector, as JSON. What only the run that trained it wants is not in it.

    Raises:
      UserError: the config has a value that JSON has not.
    """
    content = {"model_type": MARK, "format_version": VERSION, **meta.to_json()}
    del content["run"]
    # JSON has no infinite numbers.
    content["metrics"] = {name: value for name, value in meta.metrics.items() if math.isfinite(value)}
    try:
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"The config of the detector cannot be written as JSON: {error}.") from error


def parse(data: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object in a description, ours or another project's.

    Args:
      what: names the description, for messages.

    Raises:
      UserError: it is no JSON object.
    """
    try:
        content = json.loads(data, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is damaged or no JSON; copy or download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} holds {shown(content)} in place of a JSON object.")
    return content


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def read_meta_of(content: Mapping[str, Any], path: Path) -> Meta:
    """What a description says. Its config is complete, and each value is one that the setting may have.

    Args:
      content: as `parse` returns it.
      path: the file or folder that it describes, for messages.

    Raises:
      UserError: it is of another project, or of a newer version, or what it says cannot be.
    """
    if content.get("model_type") != MARK:
        raise UserError(
            f"The config.json of {path} is of no detector that is known here: its model_type is "
            f"{shown(content.get('model_type'))}, and not {MARK!r}."
        )
    version = content.get("format_version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(
            f"{path} is in version {shown(version)} of its format, and this hpr_jax reads {VERSION}; install a newer one."
        )
    problem = _problem(content)
    if problem:
        raise UserError(f"The description of {path} cannot be used: {problem}.")
    with explained(path):
        meta = Meta.from_json(content)
        # As plain values, whose errors name the key that is missing.
        check(meta.config)
        check(from_plain(meta.config))
    return meta


def _problem(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a description beside its config, as the end of a sentence; None if nothing is."""
    names, ids, step, metrics = (content.get(key) for key in ("class_names", "category_ids", "step", "metrics"))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return "class_names is no list of names"
    if not isinstance(ids, list) or not all(type(one) in (int, str) for one in ids):
        return "category_ids is no list of whole numbers or texts"
    if len(ids) != len(names) or len(set(ids)) != len(ids):
        return f"category_ids needs one id for each of the {len(names)} class_names, each another"
    if type(step) is not int or step < 0:
        return f"step is {shown(step)}, and not a number of training steps"
    if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
        return "metrics has values that are no numbers"
    return None


def named_tensors(detector: Detector) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a detector under their published names, and the texts that tell how to read them."""
    names = OFFICIAL if foreign_part(detector) is None else OWN
    if names == OFFICIAL:
        tensors = to_official(detector)
        tensors |= official_buffers(tensors)
    else:
        flat = nnx.to_flat_state(nnx.state(detector))
        tensors = {dotted_path(path): np.asarray(variable.get_value()) for path, variable in flat}
    return tensors, {"format": _LAYOUTS[names], VERSION_TEXT: str(VERSION), NAMES_TEXT: names}


def load_own(detector: Detector, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills a detector in place with tensors under our own names.

    Raises:
      UserError: a tensor is missing, left over or of another shape. The detector is unchanged then.
    """
    flat = {dotted_path(path): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(detector))}
    expected = {name: (variable.shape, False) for name, (_, variable) in flat.items()}
    compare_shapes(expected, {name: tensor.shape for name, tensor in tensors.items()}, other_classes=False)
    filled = [
        (path, variable.replace(np.ascontiguousarray(tensors[name], dtype=variable.dtype).reshape(variable.shape)))
        for name, (path, variable) in flat.items()
    ]
    nnx.update(detector, nnx.from_flat_state(filled))
