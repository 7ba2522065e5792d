"""COCO average precision."""

import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpr_jax.data.dataset import Dataset, Id, id_order
from hpr_jax.errors import UserError

# How many detections of an image and a class are taken, as COCO defines it.
LIMITS = (1, 10, 100)
# The sizes of objects with numbers of their own. In the evaluators' arrays they have the places 1 to 3; 0 is for all sizes.
SIZES = ("small", "medium", "large")


def metric_names(limits: Sequence[int] = LIMITS) -> list[str]:
    """Names of the twelve COCO numbers: AP, also at two overlaps and by size; AR by numbers of detections and by size."""
    by_size = [[f"{number}_{size}" for size in SIZES] for number in ("AP", "AR")]
    return ["AP", "AP50", "AP75", *by_size[0], *(f"AR{limit}" for limit in limits), *by_size[1]]


def coco_average_precision(
    dataset: Dataset, detections: Sequence[Mapping[str, Any]], evaluator: str = "auto", limits: Sequence[int] = LIMITS
) -> tuple[dict[str, float], dict[Id, dict[str, float]]]:
    """Average precision of boxes, as COCO defines it.

    As in pycocotools, AP takes the limit 100 if it is there, and all other numbers but AR by limits take the last limit.
    With the limits 100, 300 and 1000 the numbers are mmdetection's.

    Args:
      dataset: a whole split.
      detections: COCO results: `image_id`, `category_id`, `bbox` (left, top, width, height in pixels), `score`.
      evaluator: `pycocotools`, the reference; `hotcoco`, the same numbers much faster; `auto`: the latter if installed.
      limits: how many detections of an image and a class are taken, the best ones; three numbers, the smallest first.

    Returns:
      The twelve COCO numbers as fractions, and `AP` and `AP50` by category id. Numbers that no object defines are -1.

    Raises:
      UserError: the evaluator is not installed.
    """
    categories = dataset.classes.category_ids
    if not dataset.records.image_ids:
        find_evaluator(evaluator)
        return dict.fromkeys(metric_names(limits), -1.0), {category: {"AP": -1.0, "AP50": -1.0} for category in categories}
    comparison = compare(dataset, detections, evaluator, limits)
    return average_precision(comparison, limits)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Detections that were compared with the ground truth.

    Attributes:
      evaluation: a COCOeval, which has matched and accumulated.
      images, categories: the numbers that it knows images and categories by. It knows annotations by their places in the
        ground truth, and detections by their places in the list, both from 1 on.
    """

    evaluation: Any
    images: dict[Id, int]
    categories: dict[Id, int]


def compare(
    dataset: Dataset, detections: Sequence[Mapping[str, Any]], evaluator: str, limits: Sequence[int] = LIMITS
) -> Comparison:
    """Compares detections with the ground truth of a split that has images; arguments and errors are those of
    `coco_average_precision`.

    Without detections there is one with the score 0, which is too small to match an object: evaluators refuse an empty list.
    """
    coco, coco_eval = find_evaluator(evaluator)
    images, categories = _numbers(dataset.records.image_ids), _numbers(dataset.classes.category_ids)
    results = [
        {**one, "image_id": images[one["image_id"]], "category_id": categories[one["category_id"]]} for one in detections
    ]
    results = results or [{"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 1e-3, 1e-3], "score": 0.0}]
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        path.write_text(json.dumps(_in_coco_form(dataset, images, categories)))
        loaded = coco(str(path))
        evaluation = coco_eval(loaded, loaded.loadRes(results), "bbox")
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    return Comparison(evaluation, images, categories)


def average_precision(
    comparison: Comparison, limits: Sequence[int] = LIMITS
) -> tuple[dict[str, float], dict[Id, dict[str, float]]]:
    """What `coco_average_precision` returns, of detections that were compared with these limits."""
    evaluation = comparison.evaluation
    # [thresholds from 0.5 to 0.95, recalls, categories, sizes, limits], and the same without recalls
    precisions, recalls = (np.asarray(evaluation.eval[name]) for name in ("precision", "recall"))
    precision, last = precisions[:, :, :, 0, limits.index(100) if 100 in limits else -1], precisions[..., -1]
    numbers = [_mean(precision), _mean(last[0, ..., 0]), _mean(last[5, ..., 0])]
    numbers += [_mean(last[..., size]) for size in (1, 2, 3)]
    numbers += [_mean(recalls[:, :, 0, place]) for place in range(len(limits))]
    numbers += [_mean(recalls[:, :, size, -1]) for size in (1, 2, 3)]
    place = {number: place for place, number in enumerate(evaluation.params.catIds)}
    per_category = {
        category: {"AP": _mean(precision[:, :, place[number]]), "AP50": _mean(precision[0, :, place[number]])}
        for category, number in comparison.categories.items()
    }
    return dict(zip(metric_names(limits), numbers)), per_category


def _numbers(ids: Sequence[Id]) -> dict[Id, int]:
    """Numbers from 1 on, in the order of the ids. Evaluators want numbers, some above 0, and annotations may have any."""
    return {identity: number for number, identity in enumerate(sorted(ids, key=id_order), start=1)}


def _in_coco_form(dataset: Dataset, images: Mapping[Id, int], categories: Mapping[Id, int]) -> dict[str, Any]:
    """The ground truth with the ids that evaluators get, and with no more fields than they need: they refuse files for what
    is written in others.

    The ids of annotations are numbers from 1 on, too: pycocotools takes a match with an object 0 for no match, and a match
    with one of two objects of the same id for a match with both.
    """
    truth, records = dataset.truth, dataset.records
    if truth is None:
        raise ValueError(f"Only a part of {dataset.name} is taken, which has no ground truth of its own.")
    image_numbers = [images[image_id] for image_id in records.image_ids]
    label_numbers = [categories[category] for category in dataset.classes.category_ids]
    rows = zip(
        truth.images.tolist(), truth.labels.tolist(), truth.boxes.tolist(), truth.areas.tolist(), truth.crowd.tolist()
    )
    annotations = [
        {
            "id": number,
            "image_id": image_numbers[image],
            "category_id": label_numbers[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, (image, label, box, area, crowd) in enumerate(rows, start=1)
    ]
    sizes = records.sizes.tolist()
    return {
        "images": [
            {"id": number, "file_name": str(number), "height": height, "width": width}
            for number, (height, width) in zip(image_numbers, sizes)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in categories.values()],
    }


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
