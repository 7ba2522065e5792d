"""Evaluating from Python: `hpr_jax.evaluate`."""

from collections.abc import Mapping
from pathlib import Path

from hpr_jax.config import as_overrides
from hpr_jax.evaluation.evaluate import evaluate as run
from hpr_jax.evaluation.evaluator import EvaluationResult
from hpr_jax.runtime.compilation_cache import enable_compilation_cache


def evaluate(
    source: str | Path,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
) -> EvaluationResult:
    """Evaluates a detector on the validation split of a data set.

    Args:
      source: the detector, whatever `hpr_jax.load` takes but exported folders.
      data: the folder of the data, in place of the one that the detector was trained on.
      output: folder for `metrics.json` and `detections.json`; None: they are not written.
      overrides: settings by dotted key, e.g. `{"evaluate.side": 640}`.

    Returns:
      `metrics`, the COCO numbers by name; `per_class`, AP and AP50 by class name; `detections` in COCO's results format.

    Raises:
      UserError: there is no detector or no data, or a setting is wrong.
    """
    enable_compilation_cache()
    settings = as_overrides(overrides)
    if data is not None:
        settings.append(("data.directory", str(data)))
    return run(source, None if output is None else Path(output).expanduser(), settings)
