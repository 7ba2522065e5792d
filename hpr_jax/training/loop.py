"""Training: plan, loader, compiled steps, checkpoints, evaluation at intervals."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.config import check, to_plain
from hpr_jax.data.build import load_dataset
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.loading.batches import Batch, TrainLoader, train_batches
from hpr_jax.errors import RunError
from hpr_jax.evaluation.average_precision import MetricWriter
from hpr_jax.evaluation.evaluator import Evaluator, log_table
from hpr_jax.losses.criterion import Criterion
from hpr_jax.models.build import Compute, random_detector
from hpr_jax.runtime.devices import EVERYWHERE, data_mesh, leads, replicate, spread
from hpr_jax.runtime.logs import log_dropped, log_to_file
from hpr_jax.training.build import (
    check_batch,
    in_steps,
    make_criterion,
    make_optimizer,
    make_plan,
    make_views,
    room_for_boxes,
    wants_masks,
    warn_of_recipe,
)
from hpr_jax.training.optimizer import Optimizer, learning_rate
from hpr_jax.training.resume import check_same_everywhere, dependencies, evaluated, resume, training_arrays
from hpr_jax.training.step import DeviceBatch, StepNumbers, TrainState, TrainStep
from hpr_jax.training.stopping import StopRequests
from hpr_jax.types import Targets
from hpr_jax.weights.checkpoint import Checkpoints, Meta
from hpr_jax.weights.initial import load_initial_weights

log = logging.getLogger("hpr_jax")

# The part of the time that the loop waits for data, while the device may still be busy, that is worth a word.
DATA_WAIT = 0.1


@functools.lru_cache(maxsize=8)
def make_train_step(
    graph: nnx.GraphDef, criterion: Criterion, optimizer: Optimizer, seed: int, average_decay: float, parts: int, mesh: Mesh
) -> TrainStep:
    """Cached, so that a run resumed in the same process does not compile again."""
    return TrainStep(graph, criterion, optimizer, seed, average_decay=average_decay, parts=parts, mesh=mesh)


def load_training_data(config: ConfigDict) -> tuple[Dataset, Dataset]:
    """The whole training and validation splits."""
    train = load_dataset(config.data, "train", masks=wants_masks(config))
    return train, load_dataset(config.data, "val", train.classes)


def report_data(train: Dataset, usable: Dataset, val: Dataset) -> None:
    """Logs what was dropped and left out."""
    for dataset in (train, val):
        log_dropped(dataset)
    log.info(
        "%d training images (%d left out), %d validation images, %d classes",
        len(usable),
        len(train) - len(usable),
        len(val),
        len(train.classes.names),
    )


def initial_state(config: ConfigDict, num_classes: int, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """A new detector, split into its structure and its state, which is on every device."""
    detector = random_detector(config.model, num_classes, compute=config.compute, seed=config.train.seed)
    if config.train.initial_weights:
        load_initial_weights(detector, Path(config.train.initial_weights))
    elif config.model.backbone.get("norm") != "group":
        log.warning(
            "This backbone presumes pre-trained weights, and there are none: set --config.train.initial_weights, or use a "
            "variant that trains from scratch."
        )
    graph, params, frozen = nnx.split(detector, nnx.Param, ...)
    params, frozen = replicate(mesh, (params, frozen))
    everywhere = NamedSharding(mesh, EVERYWHERE)
    moments = jax.jit(make_optimizer(config).init, out_shardings=everywhere)(params)
    average = jax.tree.map(jnp.copy, params) if config.train.ema_decay else None
    return graph, TrainState(replicate(mesh, np.int32(0)), params, frozen, moments, average)


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


def train(config: ConfigDict, workdir: Path, *, accept_changes: bool = False) -> dict[str, float]:
    """Trains, going on from the workdir's latest checkpoint if there is one; returns the last evaluation's numbers.

    Args:
      accept_changes: goes on even if settings or data are others than those that the run began with.

    Raises:
      UserError: settings or data that cannot be trained on.
      RunError: the loss is not finite, or a checkpoint cannot be written.
      StoppedError: SIGTERM or SIGINT came; the run is saved.
    """
    check(config)
    # Looks at the settings; what it makes is made again with the detector.
    Compute(**config.compute)
    criterion = make_criterion(config)
    mesh = data_mesh()
    check_batch(config, mesh.size)
    warn_of_recipe(config)
    whole_train_set, val_set = load_training_data(config)
    train_set = whole_train_set.subset(keep_empty=config.data.keep_empty, min_side=config.data.min_side)
    plan = make_plan(config, train_set)
    config = in_steps(config, plan.steps_per_epoch)
    meta = Meta(to_plain(config), train_set.classes, 0, {}, dependencies(whole_train_set, val_set))
    check_same_everywhere(meta)
    # Nothing is written before the settings and the data have turned out usable.
    log_to_file(workdir / ("train.log" if leads() else f"train.{jax.process_index()}.log"))
    report_data(whole_train_set, train_set, val_set)
    views = make_views(config, train_set)
    max_boxes = room_for_boxes(config, train_set, views)
    graph, state = initial_state(config, len(train_set.classes.names), mesh)
    log.info("%.1f million parameters, %.1f trained", *(_millions(s) for s in ((state.params, state.frozen), state.params)))
    what = "images, a weak and a strong view of each," if views.strong else "images"
    log.info("batches of %d %s in the shapes %s", plan.batch_size, what, ", ".join(f"{h}x{w}" for h, w in plan.buckets))
    if mesh.size > 1:
        log.info("on %d devices of %d processes", mesh.size, jax.process_count())

    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    state, progress = resume(checkpoints, state, meta, accept_changes)
    start, steps = int(state.step), config.train.steps
    if start >= steps:
        log.info("Step %d of %d is done already.", start, steps)
    loader = TrainLoader(plan, views, max_boxes, share=(jax.process_index(), jax.process_count()))
    evaluator = Evaluator(config, val_set, graph)
    settings = config.train
    step_function = make_train_step(
        graph, criterion, make_optimizer(config), settings.seed, settings.ema_decay, settings.accumulation_steps, mesh
    )
    with StopRequests() as requests, MetricWriter(workdir if leads() else None, start) as writer:
        run = _Run(config, mesh, checkpoints, evaluator, meta, writer, requests, progress)
        batches = train_batches(loader, start, max(start, steps), config.data.threads, config.data.workers)
        try:
            return run.loop(step_function, state, batches)
        finally:
            batches.close()
            run.bar.close()


class _Run:
    """The loop, with its bookkeeping."""

    def __init__(self, config, mesh, checkpoints, evaluator, meta, writer, requests, progress):
        self.config, self.mesh, self.checkpoints, self.evaluator = config, mesh, checkpoints, evaluator
        self.meta, self.writer, self.requests, self.progress = meta, writer, requests, progress
        self.bar = tqdm(total=config.train.steps, unit="step", dynamic_ncols=True, disable=not leads())
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


def _millions(state: Any) -> float:
    return sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6
