"""Evaluates a checkpoint on the validation split of its config."""

import logging
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.data.build import describe_data, load_dataset
from hpr_jax.data.log_dropped import log_dropped
from hpr_jax.data.suitability import check_evaluation_data
from hpr_jax.evaluation.evaluator import EvaluationResult, Evaluator, log_table
from hpr_jax.evaluation.result_files import DETECTIONS, METRICS, origin, write_result
from hpr_jax.runtime.devices import is_main_process
from hpr_jax.weights.source import open_source

log = logging.getLogger("hpr_jax")


def evaluate(
    checkpoint: str | Path, output: Path | None, overrides: Sequence[tuple[str, str]] = (), config: ConfigDict | None = None
) -> EvaluationResult:
    """Evaluates a checkpoint on the validation split of its config, and writes `metrics.json` and `detections.json`.

    Args:
      checkpoint: a checkpoint's directory, a run's workdir, or published weights; see `open_source`.
      output: folder for the two files, which the main process alone writes; None: they are not written.
      overrides: settings (dotted key, text) in place of the checkpoint's.
      config: in place of the checkpoint's; its model must be the same.

    Raises:
      UserError: there is no checkpoint or no data, or a setting is wrong.
    """
    source = open_source(checkpoint, overrides, config)
    config, detector = source.config, source.load()
    dataset = load_dataset(config.data, "val", source.classes)
    log.info("%s.", describe_data(config, val=dataset))
    check_evaluation_data(dataset, config.data.threads)
    log_dropped(dataset)
    log.info("%s: step %d; %d images of %s", source.path, source.step, len(dataset), dataset.name)
    if is_main_process() and output is not None:
        output.mkdir(parents=True, exist_ok=True)
    graph, state = nnx.split(detector)
    result = Evaluator(config, dataset, graph).run(state)
    for name, value in result.metrics.items():
        log.info("%-10s %7.4f", name, value)
    log_table(result)
    if is_main_process() and output is not None:
        write_result(output, result, origin(source, dataset))
        log.info("Wrote %s and %s.", output / METRICS, output / DETECTIONS)
    return result
