"""A report on a run: one page of HTML with its curves, what its best detector gets wrong, and how fast it is."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from hpr_jax.analysis.diagnosis import diagnose
from hpr_jax.analysis.plots import read
from hpr_jax.analysis.report_page import page
from hpr_jax.analysis.report_sections import SECTIONS, Subject
from hpr_jax.analysis.speed import Speed, measure_speed
from hpr_jax.data.build import load_dataset
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.suitability import check_evaluation_data
from hpr_jax.errors import UserError
from hpr_jax.evaluation.average_precision import find_evaluator
from hpr_jax.evaluation.evaluator import Evaluator
from hpr_jax.evaluation.result_files import origin, stored_detections, write_result
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.models.detector import Detector
from hpr_jax.runtime.files import write_whole
from hpr_jax.training.metric_reader import read_metrics
from hpr_jax.weights.source import Source, open_source

log = logging.getLogger("hpr_jax")

# The folder below the workdir in which `evaluate` leaves its files.
EVALUATION = "evaluation"


def report(workdir: Path, output: Path, overrides: Sequence[tuple[str, str]] = (), limit: int | None = None) -> None:
    """Writes a report on the best checkpoint of a run.

    Detections of the validation split are taken from the workdir if `evaluate` or an earlier report has left them there;
    else they are computed, and left there if they are of the whole split.

    Args:
      workdir: of the run.
      output: the file to write.
      overrides: settings (dotted key, text) in place of the checkpoint's.
      limit: how many images of the validation split are looked at, the first ones; None: all.

    Raises:
      UserError: there is no checkpoint or no data, or a setting is wrong.
      OSError: the report cannot be written.
    """
    find_evaluator("hotcoco")
    source = open_source(workdir, overrides)
    whole = load_dataset(source.config.data, "val", source.classes)
    dataset = whole if limit is None else whole.first(limit)
    check_evaluation_data(dataset, source.config.data.threads)
    log.info("%s: step %d; %d images of %s", source.path, source.step, len(dataset), dataset.name)
    detector = source.load()
    detections = _detections(workdir / EVALUATION, source, detector, whole, dataset)
    subject = Subject(
        workdir=workdir,
        source=source,
        train=_training_split(source),
        diagnosis=diagnose(dataset, detections, tuple(source.config.evaluate.max_detections)),
        whole=len(whole),
        metrics=read_metrics(workdir / "metrics.jsonl"),
        speed=_speed(source, detector, dataset),
    )
    name = workdir.resolve().name
    content = page(f"Report on {name}", [(title, write(subject)) for title, write in SECTIONS.items()])
    write_whole(output, content.encode(errors="replace"))
    log.info("Wrote %s.", output)


def _detections(
    folder: Path, source: Source, detector: Detector, whole: Dataset, dataset: Dataset
) -> Sequence[dict[str, Any]]:
    """The detections of a split or its first images, from the folder of an evaluation or computed."""
    made_of = origin(source, whole)
    stored = stored_detections(folder, made_of, source.path, whole)
    if stored is not None:
        log.info("The detections are those of %s.", folder)
        wanted = set(dataset.records.image_ids)
        return [one for one in stored if one["image_id"] in wanted]
    graph, state = nnx.split(detector)
    result = Evaluator(source.config, dataset, graph).run(state)
    if len(dataset) == len(whole):
        write_result(folder, result, made_of)
    return result.detections


def _training_split(source: Source) -> Dataset | None:
    """The images that the run was trained on; None if they are no longer there."""
    settings = source.config.data
    try:
        split = load_dataset(settings, "train", source.classes)
    except (UserError, OSError) as error:
        log.warning("The report says nothing of the training split: %s", error)
        return None
    return split.subset(keep_empty=settings.keep_empty, min_side=settings.min_side)


def _speed(source: Source, detector: Detector, dataset: Dataset) -> Speed | None:
    """The speed on the first image that can be read."""
    image = next((found for record in dataset.records if (found := read(record)) is not None), None)
    return None if image is None else measure_speed(ImageDetector(detector, source.classes, source.config), image)
