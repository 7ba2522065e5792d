"""Training: plan, loader, compiled steps, checkpoints, evaluation at intervals."""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hpr_jax.data.loading.batches import Batch
from hpr_jax.errors import RunError
from hpr_jax.evaluation.evaluator import log_table
from hpr_jax.runtime.devices import is_main_process, shard
from hpr_jax.training.optimizer import learning_rate
from hpr_jax.training.state import TrainState, evaluated, training_arrays
from hpr_jax.training.step import DeviceBatch, StepNumbers, TrainStep
from hpr_jax.types import Targets
from hpr_jax.weights.checkpoint import Meta

log = logging.getLogger("hpr_jax")

# The part of the time that the loop waits for data, while the device may still be busy, that is worth a word.
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
    return DeviceBatch(*shard(mesh, arrays, axis=1), shard(mesh, rows))


class _Run:
    """The loop, with its bookkeeping."""

    def __init__(self, config, mesh, checkpoints, evaluator, meta, writer, requests, progress):
        self.config, self.mesh, self.checkpoints, self.evaluator = config, mesh, checkpoints, evaluator
        self.meta, self.writer, self.requests, self.progress = meta, writer, requests, progress
        self.bar = tqdm(total=config.train.steps, unit="step", dynamic_ncols=True, disable=not is_main_process())
        best = checkpoints.best_meta()
        self.best = best.metrics.get("AP", -1.0) if best else -1.0
        # Shapes of batches that the step has been compiled for, and how many programs that took.
        self.shapes, self.compiled = set(), 0
        # Sentences that this process has logged, or an earlier one.
        self.reported = progress.reports
        # Whether another process was asked to stop.
        self.others_stop = self.said_to_wait = False

    def loop(self, step_function, state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
        settings, metrics = self.config.train, {}
        # The numbers of a step are read while the next one runs.
        pending = None
        step = first = int(state.step)
        self.bar.initial = self.bar.n = step
        # Nothing was loaded ahead of the first batch: waiting for it says nothing.
        upcoming = self._fetch(step, batches, _Interval())
        interval = _Interval()
        while step < settings.steps:
            batch = upcoming
            with jax.transfer_guard("disallow"):
                state, numbers = step_function(state, batch, learning_rate(self.config.optimizer, step))
            self._watch_compilation(step, step_function, batch.images.shape)
            # The devices work on the step while the next batch is waited for and goes to them.
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
            stops = self.others_stop if jax.process_count() > 1 else self.requests.noted is not None
            if logs or saves or evaluates or stops:
                self._check(step, pending)
                pending = None
            self.bar.update()
            if logs:
                self._log(step, numbers, interval, loaded_ahead=step > first + 1)
                interval = _Interval()
            if evaluates:
                metrics = self._evaluate(step, state)
                interval = _Interval()
            # Last, so that what a checkpoint goes on from is written as far as it goes.
            if saves or stops:
                self._save(step, state)
            if stops and not last:
                raise self.requests.stop(step)
        if not metrics:
            metrics = self.evaluator.run(evaluated(state)).metrics
        return metrics

    def _check(self, step: int, numbers: StepNumbers) -> None:
        """Waits for the numbers of `step` and stops the run if they are not finite."""
        numbers = jax.device_get(numbers)
        offending = [name for name, value in numbers.items() if not np.isfinite(value)]
        if offending:
            kept = self.checkpoints.latest_meta()
            raise RunError(
                f"The loss is not finite at step {step}: {', '.join(offending)}. "
                + (f"The checkpoint of step {kept.step} is kept." if kept else "There was no checkpoint yet.")
            )
        self.progress.losses.append(float(numbers["loss"]))
        self.progress.reports += int(numbers["reports"])
        self.others_stop = bool(numbers["stop"])

    def _fetch(self, step: int, batches: Iterator[Batch], interval: "_Interval") -> DeviceBatch | None:
        """The batch of a step, on its way to the devices; None behind the last step."""
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
        """Each shape of batches is compiled once; what is compiled again would go unnoticed, and slow."""
        compiled = step_function.compilations
        # The second step compiles nothing either: states come back as they went in.
        if compiled > self.compiled and shape in self.shapes:
            log.warning("step %d: compiled again for batches %dx%d, which had been compiled.", step + 1, *shape[2:4])
        self.shapes.add(shape)
        self.compiled = compiled

    def _log(self, step: int, numbers: StepNumbers, interval: "_Interval", *, loaded_ahead: bool) -> None:
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
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, learning rate {rate:.2g}, {images_per_second:.2f} images/s"
            + (f", waiting for data {data_wait:.0%}" if data_wait > DATA_WAIT else "")
        )
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
        self.writer.write(step, {f"val/{name}": value for name, value in result.metrics.items()})
        log.info("step %d: AP %.4f, AP50 %.4f", step, result.metrics["AP"], result.metrics["AP50"])
        log_table(result)
        if result.metrics["AP"] > self.best:
            self.checkpoints.save_best(step, evaluated(state), self._meta(step, result.metrics))
            self.best = result.metrics["AP"]
        return result.metrics

    def _meta(self, step, metrics) -> Meta:
        run = {**self.meta.run, "progress": dataclasses.asdict(self.progress)}
        return Meta(self.meta.config, self.meta.classes, step, metrics, run)


class _Interval:
    """Numbers since the last line of the log that do not outlive the process."""

    def __init__(self):
        self.began, self.waited, self.images = time.perf_counter(), 0.0, 0
