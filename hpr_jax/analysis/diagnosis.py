"""What detections get wrong, and which annotations may be wrong: hotcoco's analyses, in terms of a data set."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpr_jax.data.dataset import Dataset, Id
from hpr_jax.evaluation.average_precision import Comparison, average_precision, compare

# A detection is right that overlaps an object of its class by so much.
OVERLAP = 0.5
# Lowest score of a detection that casts doubt on an annotation.
DOUBT = 0.5

# What hotcoco calls the errors of TIDE (Bolya et al. 2020), and what they are.
ERRORS = {
    "Cls": "right place, wrong class",
    "Loc": "right class, box too far off (overlap 0.1 to 0.5)",
    "Both": "wrong class, and box too far off",
    "Dupe": "a second detection of an object",
    "Bkg": "nothing is there",
    "Miss": "an object that nothing has found",
}
# What hotcoco calls doubts about annotations, and what they are.
DOUBTS = {"missing_annotation": "nothing is annotated here", "wrong_label": "annotated as another class"}


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """Numbers of one class; precisions are -1 where the split has no object of it."""

    name: str
    precision: float
    precision50: float
    objects: int


@dataclasses.dataclass(frozen=True)
class ImageErrors:
    """What is wrong with one image.

    Attributes:
      place: of the image among the split's records.
      right, false: places of right and of false detections in the list of the detections that count.
      missed: places of missed objects in the ground truth.
    """

    place: int
    right: list[int]
    false: list[int]
    missed: list[int]

    @property
    def count(self) -> int:
        """The number of errors."""
        return len(self.false) + len(self.missed)


@dataclasses.dataclass(frozen=True)
class Doubt:
    """A detection that casts doubt on an annotation.

    Attributes:
      kind: one of `DOUBTS`.
      place: of the image among the split's records.
      detection: place in the list of the detections that count.
      annotation: place of the object in the ground truth; None if nothing is annotated there.
    """

    kind: str
    place: int
    detection: int
    annotation: int | None


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything about the detections of a split.

    Attributes:
      dataset: the split.
      metrics: the twelve COCO numbers.
      classes: numbers by class, in the order of the labels.
      comparison: of all detections, for curves.
      threshold: the score from which on a detection counts below; None if no detection is right.
      counting: the detections that count, in COCO's results format.
      confusion: what objects of a class (rows) were taken for (columns), as hotcoco has it; the last row and column are the
        background.
      errors: TIDE's errors, as hotcoco has them; None without detections.
      calibration: how far scores are shares of right detections, as hotcoco has it; None without detections.
      images: images with errors, the worst first.
      doubts: probably wrong annotations, the surest first.
    """

    dataset: Dataset
    metrics: dict[str, float]
    classes: list[ClassResult]
    comparison: Comparison
    threshold: float | None
    counting: list[Mapping[str, Any]]
    confusion: dict[str, Any]
    errors: dict[str, Any] | None
    calibration: dict[str, Any] | None
    images: list[ImageErrors]
    doubts: list[Doubt]


def diagnose(dataset: Dataset, detections: Sequence[Mapping[str, Any]], limits: Sequence[int]) -> Diagnosis:
    """Compares detections with the ground truth of a split.

    Args:
      dataset: a split that has images and ground truth.
      detections: in COCO's results format.
      limits: as `coco_average_precision` takes them.

    Raises:
      UserError: hotcoco is not installed.
    """
    comparison = compare(dataset, detections, "hotcoco", limits)
    metrics, per_category = average_precision(comparison, limits)
    evaluation = comparison.evaluation
    threshold = best_threshold(evaluation) if detections else None
    counting = [one for one in detections if threshold is not None and one["score"] >= threshold]
    confusion = evaluation.confusion_matrix(OVERLAP, min_score=2.0 if threshold is None else threshold)
    confusion["cat_names"] = list(dataset.classes.names)
    if tuple(confusion["cat_ids"]) != tuple(comparison.categories[one] for one in dataset.classes.category_ids):
        confusion = _in_order_of_labels(confusion, [comparison.categories[one] for one in dataset.classes.category_ids])
    found = compare(dataset, counting, "hotcoco", limits)
    details = found.evaluation.image_diagnostics(OVERLAP, DOUBT)
    return Diagnosis(
        dataset=dataset,
        metrics=metrics,
        classes=_class_results(dataset, per_category),
        comparison=comparison,
        threshold=threshold,
        counting=counting,
        confusion=confusion,
        errors=evaluation.tide_errors(OVERLAP) if detections else None,
        calibration=evaluation.calibration(iou_threshold=OVERLAP) if detections else None,
        images=_image_errors(dataset, counting, details),
        doubts=_doubts(dataset, found, counting, details),
    )


def best_threshold(evaluation: Any) -> float | None:
    """The score at which precision and recall, as means over the classes, have the largest F1; None if all is wrong.

    Args:
      evaluation: a COCOeval that has accumulated.
    """
    # [recalls, classes], for the smallest overlap, objects of all sizes, and the most detections
    precision, scores = (np.asarray(evaluation.eval[name])[0, :, :, 0, -1] for name in ("precision", "scores"))
    known = (precision > -1).any(axis=0)
    if not known.any():
        return None
    means, recalls = precision[:, known].mean(axis=1), np.asarray(evaluation.params.recThrs)
    f1 = 2 * means * recalls / np.maximum(means + recalls, 1e-12)
    best = int(f1.argmax())
    reached = precision[best, known] > 0
    return float(scores[best, known][reached].mean()) if reached.any() and f1[best] > 0 else None


def _in_order_of_labels(confusion: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    """The matrix with its classes in the order of the labels, and not of the evaluator's numbers."""
    order = [list(confusion["cat_ids"]).index(number) for number in numbers]
    places = np.ix_([*order, len(order)], [*order, len(order)])
    matrices = {name: np.asarray(confusion[name])[places] for name in ("matrix", "normalized")}
    return {**confusion, **matrices, "cat_ids": numbers}


def _class_results(dataset: Dataset, per_category: Mapping[Id, Mapping[str, float]]) -> list[ClassResult]:
    truth, classes = dataset.truth, dataset.classes
    assert truth is not None, "a split without ground truth is not compared"
    objects = np.bincount(truth.labels[~truth.crowd], minlength=len(classes.names))
    return [
        ClassResult(name, per_category[category]["AP"], per_category[category]["AP50"], int(count))
        for name, category, count in zip(classes.names, classes.category_ids, objects)
    ]


def _image_errors(dataset: Dataset, counting: Sequence[Mapping[str, Any]], details: Mapping[str, Any]) -> list[ImageErrors]:
    """The images with errors. What hotcoco ignores, as crowds are, has no status."""
    truth, ids = dataset.truth, dataset.records.image_ids
    assert truth is not None, "a split without ground truth is not compared"
    place_of = {image_id: place for place, image_id in enumerate(ids)}
    images = [ImageErrors(place, [], [], []) for place in range(len(ids))]
    # Numbers count from 1 on. Without detections, there is the status of one that no image has.
    for number, status in sorted(details["dt_status"].items()):
        if number <= len(counting):
            image = images[place_of[counting[number - 1]["image_id"]]]
            (image.right if status == "tp" else image.false).append(number - 1)
    for number, status in sorted(details["gt_status"].items()):
        if status == "fn":
            images[int(truth.images[number - 1])].missed.append(number - 1)
    return sorted((image for image in images if image.count), key=lambda image: (-image.count, len(image.right)))


def _doubts(
    dataset: Dataset, found: Comparison, counting: Sequence[Mapping[str, Any]], details: Mapping[str, Any]
) -> list[Doubt]:
    image_at = {number: image_id for image_id, number in found.images.items()}
    place_of = {image_id: place for place, image_id in enumerate(dataset.records.image_ids)}
    doubts = [
        Doubt(
            one["type"],
            place_of[image_at[one["image_id"]]],
            one["dt_id"] - 1,
            None if one["gt_id"] is None else one["gt_id"] - 1,
        )
        for one in details["label_errors"]
        if one["dt_id"] <= len(counting)
    ]
    return sorted(doubts, key=lambda doubt: -counting[doubt.detection]["score"])
