"""COCO average precision."""

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpr_jax.errors import UserError

# Names of the twelve COCO numbers, in the evaluators' order.
NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


def coco_average_precision(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], evaluator: str = "auto"
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Average precision of boxes, as COCO defines it.

    Args:
      truth: the annotations of the split, in COCO's format.
      detections: COCO results: `image_id`, `category_id`, `bbox` (left, top, width, height in pixels), `score`.
      evaluator: `pycocotools`, the reference; `hotcoco`, the same numbers much faster; `auto`: the latter if installed.

    Returns:
      The twelve COCO numbers as fractions, and `AP` and `AP50` by category id. Numbers that no object defines are -1.

    Raises:
      UserError: the evaluator is not installed.
    """
    coco, coco_eval = find_evaluator(evaluator)
    truth = _complete(truth)
    if not detections and truth["images"]:
        # The evaluators refuse an empty list. A detection that is too small to match an object gives the same numbers.
        category = truth["categories"][0]["id"]
        tiny_box = [0.0, 0.0, 1e-3, 1e-3]
        detections = [{"image_id": truth["images"][0]["id"], "category_id": category, "bbox": tiny_box, "score": 0.0}]
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        path.write_text(json.dumps(truth))
        loaded = coco(str(path))
        evaluation = coco_eval(loaded, loaded.loadRes(list(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = [float(value) for value in evaluation.stats]
    # [thresholds, recalls, categories, areas, limits of detections], here at all areas and 100 detections
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    categories = list(evaluation.params.catIds)
    per_category = {
        int(category): {"AP": _mean(precision[:, :, index]), "AP50": _mean(precision[0, :, index])}
        for index, category in enumerate(categories)
    }
    return dict(zip(NAMES, numbers)), per_category


def _complete(content: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations as the evaluators need them: with `area` and `iscrowd`, which many files lack, without boxes that are not
    four finite numbers, and with new ids.

    Ids are given anew because pycocotools takes a match with the object 0 for no match, and a match with one of two objects
    of the same id for a match with both.
    """
    annotations = []
    for number, annotation in enumerate(content["annotations"], start=1):
        box = annotation["bbox"]
        if len(box) == 4 and np.all(np.isfinite(np.asarray(box, float))):
            defaults = {"area": float(box[2]) * float(box[3]), "iscrowd": 0}
            annotations.append({**defaults, **annotation, "id": number})
    return {**content, "annotations": annotations}


def _mean(precision: np.ndarray) -> float:
    """The mean of the defined values, -1 if there are none."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0


def find_evaluator(name: str) -> tuple[type, type]:
    """The classes COCO and COCOeval of an evaluator.

    Raises:
      UserError: it is not installed.
    """
    if name != "pycocotools":
        try:
            from hotcoco import COCO as HotCOCO
            from hotcoco import COCOeval as HotCOCOeval
        except ImportError:
            if name == "hotcoco":
                raise UserError(
                    "config.evaluate.evaluator is 'hotcoco', which is not installed; pip install hotcoco."
                ) from None
        else:
            return HotCOCO, HotCOCOeval
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval
