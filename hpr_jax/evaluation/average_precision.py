"""COCO average precision, and where numbers of a run are written."""

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpr_jax.errors import UserError

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NAMES += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def coco_average_precision(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], evaluator: str = "auto"
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Box AP as COCO defines it.

    Args:
      truth: the annotations of the split, in COCO form.
      detections: COCO results: `image_id`, `category_id`, `bbox` (left, top, width, height), `score`.
      evaluator: `pycocotools`, the reference; `hotcoco`, the same numbers much faster; `auto`: the latter if installed.

    Returns:
      The twelve COCO numbers as fractions, and per category id `AP` and `AP50`. What no object defines is -1.
    """
    coco, coco_eval = find_evaluator(evaluator)
    truth = _complete(truth)
    if not detections and truth["images"]:
        # The evaluators take no empty list; a speck that matches nothing has the same numbers.
        category = truth["categories"][0]["id"]
        speck = [0.0, 0.0, 1e-3, 1e-3]
        detections = [{"image_id": truth["images"][0]["id"], "category_id": category, "bbox": speck, "score": 0.0}]
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        path.write_text(json.dumps(truth))
        loaded = coco(str(path))
        evaluation = coco_eval(loaded, loaded.loadRes(list(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = [float(value) for value in evaluation.stats]
    # thresholds x recalls x categories x areas x detections; all areas, 100 detections
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    categories = list(evaluation.params.catIds)
    per_category = {
        int(category): {"AP": _mean(precision[:, :, index]), "AP50": _mean(precision[0, :, index])}
        for index, category in enumerate(categories)
    }
    return dict(zip(NAMES, numbers)), per_category


def _complete(content: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations with what evaluators need and many files lack (area, iscrowd), without boxes that are none. Numbered anew:
    pycocotools takes a match with an object whose id is 0 for none, and one of two objects with the same id for both."""
    annotations = []
    for number, annotation in enumerate(content["annotations"], start=1):
        box = annotation["bbox"]
        if len(box) == 4 and np.all(np.isfinite(np.asarray(box, float))):
            defaults = {"area": float(box[2]) * float(box[3]), "iscrowd": 0}
            annotations.append({**defaults, **annotation, "id": number})
    return {**content, "annotations": annotations}


def _mean(precision: np.ndarray) -> float:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0


def find_evaluator(name: str) -> tuple[type, type]:
    """The classes COCO and COCOeval of an evaluator.

    Raises:
      UserError: it is not installed.
    """
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
