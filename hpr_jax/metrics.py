"""COCO average precision, and where numbers of a run are written."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from hpr_jax.errors import UserError

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium")
NAMES = (*NAMES, "AR_large")


def coco_average_precision(
    annotations: Path, detections: Sequence[Mapping[str, Any]], evaluator: str = "auto"
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Box AP as COCO defines it.

    Args:
      annotations: the JSON file of the split.
      detections: COCO results: `image_id`, `category_id`, `bbox` (left, top, width, height), `score`.
      evaluator: `pycocotools`, the reference; `hotcoco`, the same numbers much faster; `auto`: the latter if installed.

    Returns:
      The twelve COCO numbers as fractions, and per category id `AP` and `AP50`. What no object defines is -1.
    """
    coco, coco_eval = _evaluator(evaluator)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco(str(annotations))
        if detections:
            evaluation = coco_eval(truth, truth.loadRes(list(detections)), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers = [float(value) for value in evaluation.stats]
            # thresholds x recalls x categories x areas x detections; all areas, 100 detections
            precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
            categories = list(evaluation.params.catIds)
        else:
            # The evaluators take no empty list.
            categories = sorted(truth.getCatIds())
            exists = [bool(truth.getAnnIds(catIds=[category], iscrowd=False)) for category in categories]
            numbers = [0.0 if any(exists) else -1.0] * len(NAMES)
            precision = np.zeros((10, 101, len(categories))) - ~np.array(exists, bool)
    per_category = {
        int(category): {"AP": _mean(precision[:, :, index]), "AP50": _mean(precision[0, :, index])}
        for index, category in enumerate(categories)
    }
    return dict(zip(NAMES, numbers)), per_category


def _mean(precision: np.ndarray) -> float:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0


def _evaluator(name: str):
    if name != "pycocotools":
        try:
            from hotcoco import COCO, COCOeval
        except ImportError:
            if name == "hotcoco":
                raise UserError(
                    "config.evaluate.evaluator is 'hotcoco', which is not installed; pip install hotcoco."
                ) from None
        else:
            return COCO, COCOeval
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


class MetricWriter:
    """Writes numbers to `metrics.jsonl` and to TensorBoard event files in one directory."""

    def __init__(self, workdir: Path):
        workdir.mkdir(parents=True, exist_ok=True)
        self._file = (workdir / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(workdir))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
