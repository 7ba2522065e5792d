"""The training loop: steps, the log, evaluation and checkpoints at intervals."""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.data.loading.batches import Batch
from hpr_jax.errors import RunError
from hpr_jax.evaluation.evaluator import Evaluator, log_table
from hpr_jax.runtime.devices import leads, spread
from hpr_jax.training.checkpoints import Checkpoints
from hpr_jax.training.metric_writer import MetricWriter
from hpr_jax.training.optimizer import learning_rate
from hpr_jax.training.resume import Progress
from hpr_jax.training.state import TrainState, evaluated, training_arrays
from hpr_jax.training.step import DeviceBatch, StepNumbers, TrainStep
from hpr_jax.training.stopping import StopRequests
from hpr_jax.types import Targets
from hpr_jax.weights.checkpoint import Meta

log = logging.getLogger("hpr_jax")
progress_log = logging.getLogger("hpr_jax.progress")

# The part of the time spent waiting for data above which the log says so.
DATA_WAIT = 0.1


def to_devices(batch: Batch, mesh: Mesh, counts: Mapping[str, int]) -> DeviceBatch:
    """Starts the transfer of the part of a batch that this process has loaded.

    Args:
      counts: this process's share of each of the batch's counts.
    """
    targets = Targets(boxes=batch.boxes, labels=batch.labels, valid=batch.valid, sizes=batch.sizes)
    arrays = jax.tree.map(lambda x: x.reshape(batch.views, -1, *x.shape[1:]), (batch.images, targets))
    devices = len(mesh.local_devices)
    rows = {name: np.array([count] + [0] * (devices - 1), np.int32) for name, count in counts.items()}
    return DeviceBatch(*spread(mesh, arrays, axis=1), spread(mesh, rows))


@dataclasses.dataclass
class TrainingLoop:
    """Takes the steps of a run, and evaluates, logs and saves in between.

    Attributes:
      config: of the run, its length in steps.
      meta: what checkpoints say of the run beside its step and its metrics.
      progress: what a run knows beside its state; it is part of checkpoints.
    """

    config: ConfigDict
    mesh: Mesh
    checkpoints: Checkpoints
    evaluator: Evaluator
    meta: Meta
    writer: MetricWriter
    requests: StopRequests
    progress: Progress

    def __post_init__(self) -> None:
        # Where standard error is no terminal, the log has lines of progress instead of a bar.
        shown = None if leads() else True
        self.bar = tqdm(total=self.config.train.steps, unit="step", dynamic_ncols=True, disable=shown)
        best = self.checkpoints.best_meta()
        self.best_ap = best.metrics.get("AP", -1.0) if best else -1.0
        # Shapes of batches that the step has been compiled for, and how many programs were compiled.
        self.shapes: set[tuple[int, ...]] = set()
        self.compiled = 0
        # How many reports about the data this process, or the one whose checkpoint it goes on from, has logged.
        self.reported = self.progress.reports
        # Whether any process was asked to stop.
        self.any_stop = False
        # Whether the log has said that steps wait for data.
        self.said_to_wait = False

    def run(self, step_function: TrainStep, state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
        """Takes all steps that are left; returns the numbers of the last evaluation.

        Raises:
          RunError: the loss is not finite, or a checkpoint cannot be written.
          StoppedError: the run was asked to stop; it is saved.
        """
        settings = self.config.train
        metrics: dict[str, float] = {}
        # The numbers of a step are read while the next one runs, so that the device does not wait for the host.
        pending: StepNumbers | None = None
        step = first = int(state.step)
        self.bar.initial = self.bar.n = step
        # The first batch is not counted as waited for: nothing could be loaded ahead of it.
        upcoming = self._fetch(step, batches, Interval())
        interval = Interval()
        while step < settings.steps:
            batch = upcoming
            assert batch is not None, "every step before the last has a batch"
            with jax.transfer_guard("disallow"):
                state, numbers = step_function(state, batch, learning_rate(self.config.optimizer, step))
            self._watch_compilation(step, step_function, batch.images.shape)
            # While the devices compute the step, the next batch is loaded and sent to them.
            upcoming = self._fetch(step + 1, batches, interval)
            if pending is not None:
                self._check(step, pending)
            pending = numbers
            step += 1
            interval.images += self.config.train.batch_size
            last = step == settings.steps
            logs = step % settings.log_every == 0 or last or step == 1
            saves = step % settings.checkpoint_every == 0 or last
            evaluates = step % settings.evaluate_every == 0 or last
            stops = self.any_stop if jax.process_count() > 1 else self.requests.noted is not None
            if logs or saves or evaluates or stops:
                self._check(step, pending)
                pending = None
            self.bar.update()
            if logs:
                self._log(step, numbers, interval, loaded_ahead=step > first + 1)
                interval = Interval()
            if evaluates:
                metrics = self._evaluate(step, state)
                interval = Interval()
            # After the log and the evaluation, so that all that a resumed run does not write again is written.
            if saves or stops:
                self._save(step, state)
            if stops and not last:
                raise self.requests.stop(step)
        if not metrics:
            metrics = self.evaluator.run(evaluated(state)).metrics
        return metrics

    def _check(self, step: int, numbers: StepNumbers) -> None:
        """Waits for the numbers of `step` and stops the run if they are not finite."""
        values = jax.device_get(numbers)
        offending = [name for name, value in values.items() if not np.isfinite(value)]
        if offending:
            latest = self.checkpoints.latest_meta()
            raise RunError(
                f"The loss is not finite at step {step}: {', '.join(offending)}. "
                + (f"The checkpoint of step {latest.step} is kept." if latest else "There was no checkpoint yet.")
            )
        self.progress.losses.append(float(values["loss"]))
        self.progress.reports += int(values["reports"])
        self.any_stop = bool(values["stop"])

    def _fetch(self, step: int, batches: Iterator[Batch], interval: "Interval") -> DeviceBatch | None:
        """Loads the batch of a step and starts its transfer to the devices; None after the last step."""
        if step >= self.config.train.steps:
            return None
        began = time.perf_counter()
        batch = next(batches)
        interval.waited += time.perf_counter() - began
        for report in batch.reports:
            self.reported += 1
            log.warning("step %d: %s (%d such reports so far)", step + 1, report, self.reported)
        return to_devices(batch, self.mesh, {"reports": len(batch.reports), "stop": int(self.requests.noted is not None)})

    def _watch_compilation(self, step: int, step_function: TrainStep, shape: tuple[int, ...]) -> None:
        """Warns when a shape of batches is compiled a second time, which nothing but a slow step would show."""
        compiled = step_function.compilations
        # Not even the second step compiles again, since a step returns its state as it took it.
        if compiled > self.compiled and shape in self.shapes:
            log.warning("step %d: compiled again for batches %dx%d, which had been compiled.", step + 1, *shape[2:4])
        self.shapes.add(shape)
        self.compiled = compiled

    def _log(self, step: int, numbers: StepNumbers, interval: "Interval", *, loaded_ahead: bool) -> None:
        seconds = time.perf_counter() - interval.began
        images_per_second, rate = interval.images / seconds, learning_rate(self.config.optimizer, step - 1)
        terms = {f"term/{name}": float(value) for name, value in jax.device_get(numbers).items() if "/" in name}
        loss, data_wait = float(np.mean(self.progress.losses)), interval.waited / seconds
        self.progress.losses.clear()
        self.writer.write(
            step,
            {
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": float(numbers["gradient_norm"]),
                "images_per_second": images_per_second,
                "data_wait": data_wait,
                "compilations": self.compiled + self.evaluator.compilations,
                "reports": self.progress.reports,
                **terms,
            },
        )
        summary = f"loss {loss:.3f}, learning rate {rate:.2g}, {images_per_second:.2f} images/s"
        if data_wait > DATA_WAIT:
            summary += f", waiting for data {data_wait:.0%}"
        self.bar.set_postfix_str(summary)
        progress_log.info("step %d of %d: %s", step, self.config.train.steps, summary)
        if data_wait > DATA_WAIT and loaded_ahead and not self.said_to_wait:
            self.said_to_wait = True
            log.warning(
                "step %d: %.0f%% of the time went into waiting for data; raise config.data.workers (now %d, on %d cores).",
                step,
                100 * data_wait,
                self.config.data.workers,
                os.cpu_count(),
            )

    def _save(self, step: int, state: TrainState) -> None:
        self.checkpoints.save(step, evaluated(state), training_arrays(state), self._meta(step, {}))

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        result = self.evaluator.run(evaluated(state))
        by_class = {f"val/class/{name}/AP": numbers["AP"] for name, numbers in result.per_class.items()}
        self.writer.write(step, {f"val/{name}": value for name, value in result.metrics.items()})
        self.writer.write_board(step, by_class)
        log.info("step %d: AP %.4f, AP50 %.4f", step, result.metrics["AP"], result.metrics["AP50"])
        log_table(result)
        if result.metrics["AP"] > self.best_ap:
            self.checkpoints.save_best(step, evaluated(state), self._meta(step, result.metrics))
            self.best_ap = result.metrics["AP"]
        return result.metrics

    def _meta(self, step: int, metrics: dict[str, float]) -> Meta:
        run = {**self.meta.run, "progress": dataclasses.asdict(self.progress)}
        return Meta(self.meta.config, self.meta.classes, step, metrics, run)


class Interval:
    """What happened since the last line of the log: seconds that were waited for data, and images trained on."""

    def __init__(self):
        self.began, self.waited, self.images = time.perf_counter(), 0.0, 0
