"""The training loop: takes steps, and logs, evaluates and saves at intervals."""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.data.loading.batches import Batch
from hpr_jax.errors import DataLostError, RunError
from hpr_jax.evaluation.evaluator import Evaluator, log_table
from hpr_jax.runtime.devices import is_main_process, shard
from hpr_jax.training.callbacks import Callbacks
from hpr_jax.training.merges import log_merges, merge_sizes
from hpr_jax.training.metric_reader import UNDEFINED
from hpr_jax.training.metric_writer import MetricWriter
from hpr_jax.training.optimizer import learning_rate
from hpr_jax.training.pictures import RunPictures
from hpr_jax.training.resume import Progress
from hpr_jax.training.state import TrainState, evaluation_variables, training_arrays
from hpr_jax.training.step import DeviceBatch, StepNumbers, TrainStep
from hpr_jax.training.stopping import StopRequests
from hpr_jax.types import Targets
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.checkpoint_writer import Checkpoints

log = logging.getLogger("hpr_jax")
progress_log = logging.getLogger("hpr_jax.progress")

# Share of the time spent waiting for data above which the log says so.
DATA_WAIT = 0.1
# So many reports about the data are all told, later ones now and then: half of a large data set may be gone.
TOLD, EVERY = 100, 1000
# Seconds of waiting for a batch after which the log says so for the first time, and seconds between two looks at whether the
# run was asked to stop meanwhile.
LONG_WAIT, LOOK = 60.0, 1.0
# What steps count for the loop alone.
COUNTS = ("reports", "stop")


def to_devices(batch: Batch, mesh: Mesh, counts: Mapping[str, int]) -> DeviceBatch:
    """Starts the transfer of a batch to the devices.

    Args:
      batch: the part that this process has loaded, `[V * B, ...]`, one view of all images after the other.
      counts: what this process adds to each of the step's counts, by name.
    """
    arrays = [batch.images, batch.boxes, batch.labels, batch.valid, batch.sizes]
    by_view = [array.reshape(batch.views, -1, *array.shape[1:]) for array in arrays]
    images, boxes, labels, valid, sizes = shard(mesh, by_view, axis=1)
    # A process has one number of each count, and an element for each of its devices: the others are zero.
    devices = len(mesh.local_devices)
    rows = {name: np.array([count] + [0] * (devices - 1), np.int32) for name, count in counts.items()}
    return DeviceBatch(images, Targets(boxes, labels, valid, sizes), shard(mesh, rows))


class Interval:
    """What has happened since the last line of the log.

    Attributes:
      began: when it began, by `time.perf_counter`.
      waited: seconds spent waiting for data.
      images: number of images trained on; the views of an image count as one.
    """

    def __init__(self) -> None:
        self.began, self.waited, self.images = time.perf_counter(), 0.0, 0


@dataclasses.dataclass
class TrainingLoop:
    """Takes the steps of a run, and evaluates, logs and saves in between.

    Attributes:
      config: of the run; its lengths count steps.
      mesh: the devices of all processes.
      checkpoints: where the run is saved.
      evaluator: of the validation split.
      meta: what checkpoints say of the run, apart from step, metrics and progress.
      writer: takes the numbers of the run.
      requests: tells whether this process was asked to stop.
      progress: what a run must remember beside its state; it is saved in checkpoints.
      callbacks: hear of steps, evaluations and checkpoints, and may end the run.
      pictures: draws what the run trains on and what it finds.
      bar: the progress bar on a terminal.
      best: the best value so far of the metric that tells the best checkpoint; below 0 before the first evaluation.
      compiled: how many programs the step has compiled.
    """

    config: ConfigDict
    mesh: Mesh
    checkpoints: Checkpoints
    evaluator: Evaluator
    meta: Meta
    writer: MetricWriter
    requests: StopRequests
    progress: Progress
    callbacks: Callbacks
    pictures: RunPictures

    def __post_init__(self) -> None:
        # None: hidden where standard error is no terminal. There the log has lines of progress instead.
        hidden = None if is_main_process() else True
        self.bar = tqdm(total=self.config.train.steps, unit="step", dynamic_ncols=True, disable=hidden)
        best = self.checkpoints.best_meta()
        self.best = self._metric(best.metrics) if best else UNDEFINED
        self.compiled = 0
        # Shapes of batches that the step has been compiled for.
        self._shapes: set[tuple[int, ...]] = set()
        # How many reports about the data are in the log, those before the checkpoint that the run goes on from included.
        self._reported = self.progress.reports
        # Whether any process was asked to stop.
        self._any_stop = False
        # Whether the log has said that steps wait for data.
        self._said_to_wait = False
        # Waits for the next batch, so that this thread can do something else if it does not come.
        self._waiter = ThreadPoolExecutor(1, "waits for batches")

    def close(self) -> None:
        """Ends the progress bar and the waiting for batches."""
        self.bar.close()
        self._waiter.shutdown(wait=False)

    def run(self, step_function: TrainStep, state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
        """Takes all steps that are left; returns the metrics of the last evaluation.

        Args:
          state: to begin with; its `step` is the number of steps that were taken.
          batches: those of the steps that are left, in order.

        Raises:
          RunError: the loss is not finite, or a checkpoint or metrics cannot be written.
          DataLostError: images can no longer be read; the run is saved, if it has a single process.
          StoppedError: the run was asked to stop; it is saved.
        """
        settings = self.config.train
        metrics: dict[str, float] = {}
        if self.is_out_of_patience():
            self._say_that_it_ends_early(int(state.step))
        # The numbers of a step are read while the next one runs, so that the device does not wait for the host.
        pending: StepNumbers | None = None
        step = first = int(state.step)
        self.bar.initial = self.bar.n = step
        # Waiting for the first batch goes to an interval that is thrown away: nothing could be loaded ahead of it.
        upcoming = self._fetch(step, batches, Interval())
        interval = Interval()
        while step < settings.steps and not (self.callbacks.ended or self.is_out_of_patience()):
            batch = upcoming
            assert batch is not None, "every step before the last has a batch"
            with jax.transfer_guard("disallow"):
                state, numbers = step_function(state, batch, self.learning_rate(step))
            self.watch_compilation(step, step_function, batch.images.shape)
            # While the devices compute the step, the next batch is loaded and sent to them.
            lost: DataLostError | None = None
            try:
                upcoming = self._fetch(step + 1, batches, interval)
            except DataLostError as error:
                # Other processes would wait for this one to save with them.
                if jax.process_count() > 1:
                    raise
                lost = error
            if pending is not None:
                self.read_numbers(step, pending)
            pending = numbers
            step += 1
            interval.images += self.config.train.batch_size
            last = step == settings.steps
            logs = step % settings.log_every == 0 or last or step == 1
            saves = step % settings.checkpoint_every == 0 or last
            evaluates = step % settings.evaluate_every == 0 or last
            # All processes must stop behind the same step: they go by the step's sum of their requests.
            stops = self._any_stop if jax.process_count() > 1 else self.requests.noted is not None
            if logs or saves or evaluates or stops or lost:
                self.read_numbers(step, pending)
                pending = None
            self.bar.update()
            if logs:
                self.write_log(step, numbers, interval, loaded_ahead=step > first + 1)
                interval = Interval()
            if evaluates:
                try:
                    metrics = self.evaluate(step, state)
                except DataLostError as error:
                    if jax.process_count() > 1:
                        raise
                    log.warning("step %d is not evaluated: %s", step, error)
                    # Training needs no evaluation; without the last one, the run has no result yet.
                    lost = error if last else lost
                interval = Interval()
            ends_early = not last and (self.callbacks.ended or (evaluates and self.is_out_of_patience()))
            # Saved after the log and the evaluation: a run that goes on from this step does not write them again.
            if saves or stops or lost or ends_early:
                self._save(step, state)
            if ends_early and self.callbacks.ended:
                log.info("A callback ends the run behind step %d of %d.", step, settings.steps)
            elif ends_early:
                self._say_that_it_ends_early(step)
            if stops and not (last or ends_early):
                raise self.requests.stop(step)
            if lost:
                raise DataLostError(f"{lost} Step {step} is saved, and the same command goes on from it.") from lost
        if not metrics:
            metrics = self.evaluator.run(evaluation_variables(state)).metrics
        refiner = self.config.model.refiner
        initial = tuple(refiner.merge_initial) or (1.0,) * (1 + len(refiner.auxiliaries))
        log_merges(state.params, None if refiner.merge_xavier else initial)
        return metrics

    def learning_rate(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        return learning_rate(self.config.optimizer, step, self.config.train.steps)

    def read_numbers(self, step: int, numbers: StepNumbers) -> None:
        """Waits for the numbers of a step, and keeps those that later lines of the log need.

        Raises:
          RunError: one of them is not finite.
        """
        values = jax.device_get(numbers)
        offending = [name for name, value in values.items() if not np.isfinite(value)]
        if offending:
            latest = self.checkpoints.latest_meta()
            raise RunError(
                f"The loss is not finite at step {step}: {', '.join(offending)}. "
                + (f"The checkpoint of step {latest.step} is kept." if latest else "There was no checkpoint yet.")
            )
        self.callbacks.on_step(step, {name: float(value) for name, value in values.items() if name not in COUNTS})
        self.progress.losses.append(float(values["loss"]))
        self.progress.reports += int(values["reports"])
        self._any_stop = bool(values["stop"])

    def _fetch(self, step: int, batches: Iterator[Batch], interval: Interval) -> DeviceBatch | None:
        """Waits for the batch of a step and starts its transfer to the devices; None after the last step."""
        if step >= self.config.train.steps:
            return None
        began = time.perf_counter()
        batch = self._wait_for(step, batches)
        interval.waited += time.perf_counter() - began
        for report in batch.reports:
            self._reported += 1
            if self._reported <= TOLD or self._reported % EVERY == 0:
                log.warning("step %d: %s (%d such reports so far)", step + 1, report, self._reported)
            if self._reported == TOLD:
                log.warning("From now on such reports are counted in metrics.jsonl, and one of %d is told.", EVERY)
        if step == 0:
            self.pictures.draw_data(batch)
        return to_devices(batch, self.mesh, {"reports": len(batch.reports), "stop": int(self.requests.noted is not None)})

    def _wait_for(self, step: int, batches: Iterator[Batch]) -> Batch:
        """The next batch, that of step `step + 1`. Says if it takes long, and gives up if the run was asked to stop."""
        coming, told, began = self._waiter.submit(next, batches), LONG_WAIT, time.perf_counter()
        while not wait([coming], LOOK).done:
            waited = time.perf_counter() - began
            if waited >= told:
                told *= 2
                directory = self.config.data.directory
                log.warning("step %d: waiting for images for %.0f s; is %s slow or gone?", step + 1, waited, directory)
            if self.requests.noted is not None and jax.process_count() == 1:
                raise DataLostError("The run does not wait for images any longer.")
        return coming.result()

    def watch_compilation(self, step: int, step_function: TrainStep, shape: tuple[int, ...]) -> None:
        """Warns if the step was compiled again for a shape of batches, which nothing but its slowness would show.

        It should not be: the state that a step returns has the shapes and devices of the one that it takes.
        """
        compiled = step_function.compilations
        if compiled > self.compiled and shape in self._shapes:
            log.warning(
                "step %d: compiled again for batches of %dx%d, which it was compiled for before.", step + 1, *shape[2:4]
            )
        self._shapes.add(shape)
        self.compiled = compiled

    def write_log(self, step: int, numbers: StepNumbers, interval: Interval, *, loaded_ahead: bool) -> None:
        """Writes what happened in an interval that ends behind `step`: to the metrics, the progress bar and the log.

        Args:
          loaded_ahead: whether batches could be loaded while steps ran, so that waiting for them says something.
        """
        seconds = time.perf_counter() - interval.began
        images_per_second, rate = interval.images / seconds, self.learning_rate(step - 1)
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
        self.bar.set_postfix_str(f"{summary}, gradient {float(numbers['gradient_norm']):.2g}")
        progress_log.info("step %d of %d: %s", step, self.config.train.steps, summary)
        if data_wait > DATA_WAIT and loaded_ahead and not self._said_to_wait:
            self._said_to_wait = True
            log.warning(
                "step %d: %.0f%% of the time went into waiting for data; raise config.data.workers (now %d, on %d cores).",
                step,
                100 * data_wait,
                self.config.data.workers,
                os.cpu_count(),
            )

    def _save(self, step: int, state: TrainState) -> None:
        self.checkpoints.save(step, evaluation_variables(state), training_arrays(state), self._meta(step, {}))
        self.callbacks.on_checkpoint(step, self.checkpoints.workdir)

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluates a state, writes the metrics, and saves the state if it is the best so far; returns the metrics.

        Raises:
          DataLostError: images can no longer be read.
        """
        result = self.evaluator.run(evaluation_variables(state))
        by_class = {f"val/class/{name}/AP": numbers["AP"] for name, numbers in result.per_class.items()}
        refiner = self.config.model.refiner
        merges = merge_sizes(state.params, (refiner.primary, *refiner.auxiliaries))
        self.writer.write(step, {f"val/{name}": value for name, value in result.metrics.items()} | merges)
        self.writer.write_board(step, by_class)
        log.info("step %d: AP %.4f, AP50 %.4f", step, result.metrics["AP"], result.metrics["AP50"])
        log_table(result)
        value = self._metric(result.metrics)
        if value == UNDEFINED:
            log.warning("step %d: the validation images have no objects for %s.", step, self.config.train.best_metric)
        self.progress.note_evaluation(value, self.config.train.min_gain)
        self.callbacks.on_evaluation(step, result)
        if value > self.best:
            self.checkpoints.save_best(step, evaluation_variables(state), self._meta(step, result.metrics))
            self.best = value
        # At last, since nothing depends on it.
        self.pictures.draw_evaluation(step, result.detections)
        return result.metrics

    def _metric(self, metrics: Mapping[str, float]) -> float:
        """The metric that tells the best checkpoint."""
        name = self.config.train.best_metric
        if name == "AR":
            name = f"AR{self.config.evaluate.max_detections[-1]}"
        return metrics.get(name, UNDEFINED)

    def is_out_of_patience(self) -> bool:
        """Whether the run ends early, since its last evaluations have not gained enough."""
        return 0 < self.config.train.patience <= self.progress.stale

    def _say_that_it_ends_early(self, step: int) -> None:
        settings = self.config.train
        log.info(
            "The run ends early, at step %d of %d: %d evaluations in a row have gained no more than %g in %s.",
            step,
            settings.steps,
            self.progress.stale,
            settings.min_gain,
            settings.best_metric,
        )

    def _meta(self, step: int, metrics: dict[str, float]) -> Meta:
        run = {**self.meta.run, "progress": dataclasses.asdict(self.progress)}
        return Meta(self.meta.config, self.meta.classes, step, metrics, run)
