"""Training: plan, loader, one jitted step, checkpoints, evaluation at intervals."""

import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.checkpoint import Checkpoints, Meta
from hpr_jax.config import check, differences, to_plain
from hpr_jax.data.batching import Batch, TrainLoader, train_batches
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.sources import load_dataset
from hpr_jax.errors import RunError, UserError
from hpr_jax.evaluate import Evaluator, log_table
from hpr_jax.initial_weights import load_initial_weights
from hpr_jax.logs import log_dropped, log_to_file
from hpr_jax.losses.criterion import Criterion
from hpr_jax.metrics import MetricWriter
from hpr_jax.models.build import Compute, build_detector
from hpr_jax.optimizer import Optimizer, learning_rate
from hpr_jax.recipe import (
    in_steps,
    make_criterion,
    make_optimizer,
    make_plan,
    make_views,
    room_for_boxes,
    wants_masks,
    warn_of_recipe,
)
from hpr_jax.train_step import DeviceBatch, StepNumbers, TrainState, TrainStep
from hpr_jax.types import Targets

log = logging.getLogger("hpr_jax")


@functools.lru_cache(maxsize=8)
def make_train_step(graph: nnx.GraphDef, criterion: Criterion, optimizer: Optimizer, seed: int, views: int = 1) -> TrainStep:
    """Cached, so that a run resumed in the same process does not compile again."""
    return TrainStep(graph, criterion, optimizer, seed, views)


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


def initial_state(config: ConfigDict, num_classes: int) -> tuple[nnx.GraphDef, TrainState]:
    """A new detector, split into its structure and its state."""
    # This generator's programs compile several times faster than the default one's.
    key = jax.random.key(config.train.seed, impl="rbg")
    detector = nnx.jit(lambda key: build_detector(config.model, num_classes, compute=config.compute, rngs=nnx.Rngs(key)))(
        key
    )
    if config.train.initial_weights:
        load_initial_weights(detector, Path(config.train.initial_weights))
    elif config.model.backbone.get("norm") != "group":
        log.warning(
            "This backbone presumes pre-trained weights, and there are none: set --config.train.initial_weights, or use a "
            "variant that trains from scratch."
        )
    graph, params, frozen = nnx.split(detector, nnx.Param, ...)
    moments = jax.jit(make_optimizer(config).init)(params)
    return graph, TrainState(jnp.zeros((), jnp.int32), params, frozen, moments)


def to_device(batch: Batch) -> DeviceBatch:
    """Starts the transfer of a batch."""
    targets = Targets(boxes=batch.boxes, labels=batch.labels, valid=batch.valid, sizes=batch.sizes)
    return jax.device_put(DeviceBatch(images=batch.images, targets=targets))


def train(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains, going on from the workdir's latest checkpoint if there is one; returns the last evaluation's numbers.

    Raises:
      UserError: settings or data that cannot be trained on.
      RunError: the loss is not finite.
    """
    check(config)
    # Looks at the settings; what it makes is made again with the detector.
    Compute(**config.compute)
    criterion = make_criterion(config)
    warn_of_recipe(config)
    whole_train_set, val_set = load_training_data(config)
    train_set = whole_train_set.subset(keep_empty=config.data.keep_empty, min_side=config.data.min_side)
    plan = make_plan(config, train_set)
    config = in_steps(config, plan.steps_per_epoch)
    # Nothing is written before the settings and the data have turned out usable.
    log_to_file(workdir / "train.log")
    report_data(whole_train_set, train_set, val_set)
    views = make_views(config, train_set)
    max_boxes = room_for_boxes(config, train_set, views)
    graph, state = initial_state(config, len(train_set.classes.names))
    log.info("%.1f million parameters, %.1f trained", *(_millions(s) for s in ((state.params, state.frozen), state.params)))
    what = "images, a weak and a strong view of each," if views.strong else "images"
    log.info("batches of %d %s in the shapes %s", plan.batch_size, what, ", ".join(f"{h}x{w}" for h, w in plan.buckets))

    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    meta = Meta(to_plain(config), train_set.classes, 0, {})
    state = _resume(checkpoints, state, meta)
    start, steps = int(state.step), config.train.steps
    if start >= steps:
        log.info("Step %d of %d is done already.", start, steps)
    loader = TrainLoader(plan, views, max_boxes)
    batches = train_batches(loader, start, max(start, steps), config.data.threads)
    evaluator = Evaluator(config, val_set, graph)
    step_function = make_train_step(graph, criterion, make_optimizer(config), config.train.seed, views.count)
    run = _Run(config, workdir, checkpoints, evaluator, meta, start)
    try:
        metrics = run.loop(step_function, state, batches)
    finally:
        run.close()
        checkpoints.close()
    return metrics


class _Run:
    """The loop, with its bookkeeping."""

    def __init__(self, config, workdir, checkpoints, evaluator, meta, start):
        self.config, self.checkpoints, self.evaluator, self.meta = config, checkpoints, evaluator, meta
        self.writer = MetricWriter(workdir)
        self.bar = tqdm(total=config.train.steps, initial=start, unit="step", dynamic_ncols=True)
        best = checkpoints.best_meta()
        self.best = best.metrics.get("AP", -1.0) if best else -1.0
        self.refilled = 0

    def loop(self, step_function, state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
        settings, metrics = self.config.train, {}
        interval = _Interval()
        # The numbers of a step are read while the next one runs.
        pending = None
        step = first = int(state.step)
        while step < settings.steps:
            began = time.perf_counter()
            batch = next(batches)
            interval.waited += time.perf_counter() - began
            self._report(step, batch)
            state, numbers = step_function(state, to_device(batch), learning_rate(self.config.optimizer, step))
            if pending is not None:
                self._check(step, pending, interval)
            pending = numbers
            step += 1
            interval.images += len(batch.images) // batch.views
            last = step == settings.steps
            logs = step % settings.log_every == 0 or last or step == first + 1
            saves = step % settings.checkpoint_every == 0 or last
            evaluates = step % settings.evaluate_every == 0 or last
            if logs or saves or evaluates:
                self._check(step, pending, interval)
                pending = None
            self.bar.update()
            if logs:
                self._log(step, numbers, interval)
                interval = _Interval()
            if saves:
                self._save(step, state)
            if evaluates:
                metrics = self._evaluate(step, state)
                interval = _Interval()
        if not metrics:
            metrics = self._evaluate(step, state)
        return metrics

    def _check(self, step: int, numbers: StepNumbers, interval: "_Interval") -> None:
        """Waits for the numbers of `step` and stops the run if they are not finite."""
        loss, norm = float(numbers["loss"]), float(numbers["gradient_norm"])
        if not (np.isfinite(loss) and np.isfinite(norm)):
            offending = [name for name, value in jax.device_get(numbers).items() if not np.isfinite(value)]
            kept = self.checkpoints.latest_meta()
            raise RunError(
                f"The loss is not finite at step {step}: {', '.join(offending)}. "
                + (f"The checkpoint of step {kept.step} is kept." if kept else "There was no checkpoint yet.")
            )
        interval.losses.append(loss)

    def _report(self, step: int, batch: Batch) -> None:
        self.refilled += len(batch.reports)
        for report in batch.reports:
            log.warning("step %d: %s (%d such reports so far)", step + 1, report, self.refilled)

    def _log(self, step: int, numbers: StepNumbers, interval: "_Interval") -> None:
        seconds = time.perf_counter() - interval.began
        images_per_second, rate = interval.images / seconds, learning_rate(self.config.optimizer, step - 1)
        terms = {f"term/{name}": float(value) for name, value in jax.device_get(numbers).items() if "/" in name}
        self.writer.write(
            step,
            {
                "loss": float(np.mean(interval.losses)),
                "learning_rate": rate,
                "gradient_norm": float(numbers["gradient_norm"]),
                "images_per_second": images_per_second,
                "data_wait": interval.waited / seconds,
                "reports": self.refilled,
                **terms,
            },
        )
        self.bar.set_postfix_str(
            f"loss {np.mean(interval.losses):.3f}, learning rate {rate:.2g}, {images_per_second:.2f} images/s"
        )

    def _save(self, step: int, state: TrainState) -> None:
        training = {"optimizer": state.optimizer, "step": state.step}
        self.checkpoints.save(step, _model(state), training, self._meta(step, {}))

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        result = self.evaluator.run(nnx.merge_state(state.params, state.frozen))
        self.writer.write(step, {f"val/{name}": value for name, value in result.metrics.items()})
        log.info("step %d: AP %.4f, AP50 %.4f", step, result.metrics["AP"], result.metrics["AP50"])
        log_table(result)
        if result.metrics["AP"] > self.best:
            self.checkpoints.save_best(step, _model(state), self._meta(step, result.metrics))
            self.best = result.metrics["AP"]
        return result.metrics

    def _meta(self, step, metrics) -> Meta:
        return Meta(self.meta.config, self.meta.classes, step, metrics)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()


class _Interval:
    """Numbers since the last line of the log."""

    def __init__(self):
        self.began, self.waited, self.images, self.losses = time.perf_counter(), 0.0, 0, []


def _resume(checkpoints: Checkpoints, state: TrainState, meta: Meta) -> TrainState:
    found = checkpoints.latest_meta()
    if found is None:
        return state
    different = differences(found.config["model"], meta.config["model"], "config.model.")
    if found.classes != meta.classes:
        different.append("the classes of the data set")
    if different:
        raise UserError(
            f"The workdir holds a run of another model, which differs in {', '.join(different)}; choose another workdir."
        )
    for section in ("compute", "data", "augmentation", "optimizer", "loss", "train"):
        for difference in differences(found.config[section], meta.config[section], f"config.{section}."):
            log.warning("Goes on with another setting than the run began with: %s.", difference)
    training = {"optimizer": state.optimizer, "step": state.step}
    model, training = checkpoints.restore(found.step, _model(state), training)
    params, frozen = nnx.split_state(model, nnx.Param, ...)
    log.info("Goes on from step %d.", found.step)
    return TrainState(training["step"], params, frozen, training["optimizer"])


def _model(state: TrainState) -> nnx.State:
    return nnx.merge_state(state.params, state.frozen)


def _millions(state: Any) -> float:
    return sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6
