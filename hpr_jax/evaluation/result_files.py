"""The files of an evaluation, `metrics.json` and `detections.json`, and whether they are those that one would write now."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Dataset
from hpr_jax.evaluation.evaluator import EvaluationResult
from hpr_jax.runtime.files import write_whole
from hpr_jax.weights.source import Source

METRICS, DETECTIONS = "metrics.json", "detections.json"
# Settings of which detections depend, beside the model.
_SETTINGS = {
    "evaluate": ("side", "max_side", "canvas", "detections"),
    "data": ("image_bits",),
    "compute": ("dtype",),
}


def origin(source: Source, dataset: Dataset) -> dict[str, Any]:
    """What the detections of a detector on a split come from, as JSON values."""
    config = to_plain(source.config)
    return {
        "checkpoint": "/".join(source.path.parts[-2:]),
        "step": source.step,
        "data": dataset.fingerprint,
        "settings": {f"{section}.{name}": config[section][name] for section, names in _SETTINGS.items() for name in names},
    }


def write_result(folder: Path, result: EvaluationResult, origin: Mapping[str, Any]) -> None:
    """Writes the two files of an evaluation; `metrics.json` is the last, and tells what both come from.

    Raises:
      OSError: they cannot be written.
    """
    write_whole(folder / DETECTIONS, json.dumps(result.detections).encode())
    metrics = {**result.metrics, "per_class": result.per_class, "origin": {**origin, "count": len(result.detections)}}
    write_whole(folder / METRICS, (json.dumps(metrics, indent=2) + "\n").encode())


def stored_detections(
    folder: Path, origin: Mapping[str, Any], checkpoint: Path, dataset: Dataset
) -> list[dict[str, Any]] | None:
    """The detections that an evaluation has written to a folder; None if there are none that are complete, newer than the
    checkpoint, and of this origin.

    Args:
      checkpoint: the path of the checkpoint, whose detections they shall be.
      dataset: the whole split.
    """
    try:
        if (folder / DETECTIONS).stat().st_mtime < checkpoint.stat().st_mtime:
            return None
        found = json.loads((folder / DETECTIONS).read_bytes())
        written = json.loads((folder / METRICS).read_bytes())["origin"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(found, list) or written != {**origin, "count": len(found)}:
        return None
    images, categories = set(dataset.records.image_ids), set(dataset.classes.category_ids)
    return found if all(_is_detection(one, images, categories) for one in found) else None


def _is_detection(one: Any, images: set[Any], categories: set[Any]) -> bool:
    """Whether a JSON value is a detection in one of the images."""
    try:
        numbers = [*one["bbox"], one["score"]]
        finite = len(numbers) == 5 and all(map(math.isfinite, numbers))
        return finite and one["image_id"] in images and one["category_id"] in categories
    except (TypeError, LookupError):
        return False
