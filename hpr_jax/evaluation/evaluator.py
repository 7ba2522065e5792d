"""Detections of a whole split, and their average precision."""

import dataclasses
import itertools
import logging
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.data.augmentation.crop_resize_flip import evaluation_geometries
from hpr_jax.data.dataset import Classes, Dataset, Id, id_order
from hpr_jax.data.loading.batch_plan import choose_buckets, evaluation_plan
from hpr_jax.data.loading.batches import EvaluationLoader, evaluation_batches
from hpr_jax.evaluation.average_precision import coco_average_precision, find_evaluator
from hpr_jax.inference.detect import make_detect
from hpr_jax.runtime.devices import agree, data_mesh, gather, is_main_process, on_devices_of, shard

log = logging.getLogger("hpr_jax")


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Average precision, and the detections that it was computed from.

    Attributes:
      metrics: the twelve COCO numbers by name, as fractions.
      per_class: `AP` and `AP50` by class name.
      detections: in COCO's results format.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    detections: list[dict[str, Any]]


class Evaluator:
    """Evaluates states of one detector on one split of a data set.

    It holds the compiled programs, one for each bucket, for later states. Every process detects objects in a share of the
    images with its own devices, and every process gets the result.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, graph: nnx.GraphDef):
        settings = config.evaluate
        geometries = evaluation_geometries(dataset.sizes, settings.side, settings.max_side, settings.canvas)
        buckets = choose_buckets(np.array([g.size for g in geometries]), settings.buckets)
        self.mesh = data_mesh(jax.local_devices())
        batch_size = settings.batch_size * self.mesh.size
        plan = evaluation_plan(geometries, batch_size=batch_size, buckets=buckets)
        share, patience = (jax.process_index(), jax.process_count()), config.data.patience
        self.loader = EvaluationLoader(dataset, plan, batch_size, share, patience)
        self.dataset, self.threads = dataset, config.data.threads
        find_evaluator(settings.evaluator)
        self.evaluator, self.limits = settings.evaluator, tuple(settings.max_detections)
        self.detect = make_detect(graph, settings.detections, self.mesh)

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        # A method of jitted functions that JAX's types leave out.
        return self.detect._cache_size()  # type: ignore[attr-defined]

    def run(self, state: nnx.State) -> EvaluationResult:
        """Detects objects in every image and computes AP.

        Args:
          state: of the detector, on all devices of this process or of all processes.

        Raises:
          DataLostError: the folder of the images cannot be reached any more.
        """
        state = on_devices_of(self.mesh, state)
        found: list[dict[str, Any]] = []
        batches = evaluation_batches(self.loader, self.threads)
        hidden = not is_main_process()
        bar = tqdm(batches, total=len(self.loader), desc="evaluation", unit="batch", leave=False, disable=hidden)
        for batch, planned in zip(bar, self.loader.plan):
            for report in batch.reports:
                log.warning("%s", report)
            images, sizes = shard(self.mesh, (batch.images, batch.sizes))
            boxes, scores, labels, valid = jax.device_get(self.detect(state, images, sizes))
            for place, record in enumerate(batch.records):
                if record is not None:
                    height, width = planned.slots[place].geometry.resized
                    scale = np.array([record.width / width, record.height / height] * 2)
                    scaled = boxes[place].astype(np.float64) * scale
                    found += _coco_results(
                        record.image_id, self.dataset.classes, scaled, scores[place], labels[place], valid[place]
                    )
        # Sorted, so that the order does not depend on the number of processes.
        found = sorted(itertools.chain(*gather(found)), key=lambda one: id_order(one["image_id"]))

        def average_precision():
            metrics, per_category = coco_average_precision(self.dataset, found, self.evaluator, self.limits)
            # Pairs, since the result goes to other processes as JSON, where keys are text.
            return metrics, list(per_category.items())

        metrics, per_category = agree(average_precision)
        classes = self.dataset.classes
        names = {
            number: name if classes.names.count(name) == 1 else f"{name} ({number})"
            for number, name in zip(classes.category_ids, classes.names)
        }
        return EvaluationResult(metrics, {names[c]: numbers for c, numbers in per_category}, found)


def _coco_results(
    image_id: Id, classes: Classes, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, valid: np.ndarray
) -> list[dict[str, Any]]:
    """Detections of one image in COCO's results format.

    Args:
      boxes: float64 `[n, 4]`, xyxy in pixels of the image.
      scores, labels: `[n]`.
      valid: bool `[n]`; the others are left out.
    """
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    return [
        {
            "image_id": image_id,
            "category_id": classes.category_ids[label],
            "bbox": [round(float(side), 3) for side in box],
            "score": float(score),
        }
        for box, score, label, is_valid in zip(boxes, scores, labels, valid)
        if is_valid
    ]


def log_table(result: EvaluationResult) -> None:
    """Logs a table of AP and AP50 by class."""
    width = max(len(name) for name in ("class", *result.per_class))
    log.info("%-*s %7s %7s", width, "class", "AP", "AP50")
    for name, numbers in result.per_class.items():
        log.info("%-*s %7.4f %7.4f", width, name, numbers["AP"], numbers["AP50"])
