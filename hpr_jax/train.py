"""Training: plan, loader, one jitted step, checkpoints, evaluation at intervals."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.checkpoint import Checkpoints, Meta
from hpr_jax.config import check, differences, to_plain
from hpr_jax.data.batching import Batch, TrainLoader, train_batches
from hpr_jax.data.coco import CocoDataset, load_coco
from hpr_jax.data.plan import TrainPlan, choose_buckets
from hpr_jax.data.transforms import draw_weak
from hpr_jax.errors import RunError, UserError
from hpr_jax.evaluate import Evaluator, log_table
from hpr_jax.initial_weights import load_initial_weights
from hpr_jax.logs import log_dropped_boxes, log_to_file
from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.dense import DenseLoss
from hpr_jax.losses.matched import AlignedMatchedLoss
from hpr_jax.metrics import MetricWriter
from hpr_jax.models.build import build_detector
from hpr_jax.ops.boxes import whwh
from hpr_jax.optimizer import Optimizer, global_norm, learning_rate
from hpr_jax.types import Targets

log = logging.getLogger("hpr_jax")


@flax.struct.dataclass
class TrainState:
    """What a step changes, and the variables that it does not (`frozen`)."""

    step: jax.Array
    params: nnx.State
    frozen: nnx.State
    optimizer: Any


@flax.struct.dataclass
class DeviceBatch:
    """The part of a batch that a step reads: uint8 images `[B, H, W, 3]` and their targets."""

    images: jax.Array
    targets: Targets


StepNumbers = dict[str, jax.Array]


@functools.lru_cache(maxsize=8)
def make_train_step(
    graph: nnx.GraphDef, criterion: Criterion, optimizer: Optimizer, seed: int, padding_is_image: bool = False
) -> Callable[[TrainState, DeviceBatch, float], tuple[TrainState, StepNumbers]]:
    """One optimisation step: state, batch and learning rate -> state (the old one is donated) and numbers: every loss
    term, `loss` and `gradient_norm`. Cached, so that a run resumed in the same process does not compile again.

    `padding_is_image`: see `on_canvas`."""

    def loss_of(params, frozen, batch, key):
        detector = nnx.merge(graph, params, frozen)
        images, targets = detector.normalize(batch.images, batch.targets.sizes), batch.targets
        if padding_is_image:
            targets = on_canvas(targets, images.shape[1:3])
        draw_key, drop_key = jax.random.split(key)
        denoising = detector.denoiser.draw(draw_key, targets) if detector.denoiser is not None else None
        outputs = detector(images, targets.sizes, denoising=denoising, train=True, key=drop_key)
        terms = {name: jnp.sum(term) for name, term in criterion(outputs, targets, denoising).items()}
        return sum(terms.values()), terms

    def step(state, batch, learning_rate):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, terms), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params, state.frozen, batch, key)
        numbers = {**terms, "loss": loss, "gradient_norm": global_norm(gradients)}
        params, moments = optimizer.update(gradients, state.optimizer, state.params, learning_rate)
        return state.replace(step=state.step + 1, params=params, optimizer=moments), numbers

    return jax.jit(step, donate_argnums=0)


def make_optimizer(config: ConfigDict) -> Optimizer:
    """The optimizer that a config asks for."""
    settings = config.optimizer
    return Optimizer(settings.clip_norm, settings.weight_decay, settings.backbone_multiplier)


def make_criterion(config: ConfigDict) -> Criterion:
    """The losses that a config asks for.

    Raises:
      UserError: they do not suit the model.
    """
    model, loss = config.model, config.loss
    criterion = Criterion(branch_weights=tuple((name, loss.branch_weight) for name in model.refiner.auxiliaries))
    if (model.queries.kind == "distinct") != ("dense" in loss):
        raise UserError("config.loss.dense goes with config.model.queries.kind 'distinct', and only with it.")
    if "dense" in loss:
        criterion = dataclasses.replace(criterion, dense=DenseLoss(**loss.dense))
    if "aligned" in loss:
        aligned = loss.aligned
        if len(aligned.repeats) != model.refiner.layers:
            raise UserError(
                f"config.loss.aligned.repeats lists {len(aligned.repeats)} layers, and config.model.refiner.layers is "
                f"{model.refiner.layers}; give one number for each."
            )
        criterion = dataclasses.replace(
            criterion,
            matched=AlignedMatchedLoss(alpha=aligned.alpha, gamma=aligned.gamma, tau=aligned.tau),
            repeats=tuple(aligned.repeats),
            proposal_repeats=aligned.proposal_repeats,
        )
    return criterion


def on_canvas(targets: Targets, shape: tuple[int, int]) -> Targets:
    """Targets as if the padding belonged to the images, whose shape is then (height, width) `shape`. Some official recipes
    train so; see `config.train.padding_is_image`."""
    sizes = jnp.broadcast_to(jnp.array(shape, jnp.int32), targets.sizes.shape)
    scale = whwh(targets.sizes) / whwh(sizes)
    return targets.replace(boxes=targets.boxes * scale[:, None], sizes=sizes)


def in_steps(config: ConfigDict, steps_per_epoch: int) -> ConfigDict:
    """A copy of the config whose length, milestones and evaluation interval count steps."""
    config = config.copy_and_resolve_references()
    if not config.train.steps:
        config.train.steps = config.train.epochs * steps_per_epoch
        config.train.evaluate_every *= steps_per_epoch
        config.optimizer.milestones = tuple(milestone * steps_per_epoch for milestone in config.optimizer.milestones)
    return config


def warn_of_augmentation(config: ConfigDict) -> None:
    """Says which augmentations of a recipe cannot be had.

    Raises:
      UserError: training without them would make no sense.
    """
    if config.augmentation.kind != "detr":
        raise UserError(
            f"config.augmentation.kind is {config.augmentation.kind!r}: large-scale jitter with copy-paste is not built "
            "yet; use a variant without _lsj."
        )
    if config.augmentation.strong_views:
        log.warning(
            "The strong views of data re-augmentation (config.augmentation.strong_views) are not built yet: this run trains "
            "on weakly augmented images alone, and will fall short of the published AP."
        )


def make_plan(config: ConfigDict, dataset: CocoDataset) -> TrainPlan:
    """The batches of a run; its buckets suit the sizes of a trial epoch."""
    sizes, batch_size = dataset.sizes, config.train.batch_size
    if len(dataset) < batch_size:
        raise UserError(
            f"{dataset.annotations} has {len(dataset)} images to train on, fewer than config.train.batch_size "
            f"{batch_size}; lower it, or set --config.data.keep_empty=True if images without objects shall count."
        )
    draw = functools.partial(draw_weak, sizes, config.augmentation.to_dict())
    trial = np.array([g.size for g in draw(np.random.default_rng((config.train.seed, 2**31)))])
    # Whatever later epochs draw must fit, too; crops come in both orientations.
    side, max_side = max(config.augmentation.sides), config.augmentation.max_side
    crops, landscape = config.augmentation.crop > 0, sizes[:, 0] <= sizes[:, 1]
    cover = [(min(side, max_side), max_side)] * bool(crops or landscape.any())
    cover += [(max_side, min(side, max_side))] * bool(crops or not landscape.all())
    buckets = choose_buckets(trial, config.data.buckets, cover)
    return TrainPlan(draw, len(dataset), batch_size=batch_size, buckets=buckets, seed=config.train.seed)


def load_training_data(config: ConfigDict) -> tuple[CocoDataset, CocoDataset]:
    """The whole training and validation splits."""
    data = config.data
    train = load_coco(Path(data.directory), data.train_images, data.train_annotations)
    return train, load_coco(Path(data.directory), data.val_images, data.val_annotations, train.classes)


def report_data(train: CocoDataset, usable: CocoDataset, val: CocoDataset) -> None:
    """Logs what was dropped and left out."""
    for dataset in (train, val):
        log_dropped_boxes(dataset)
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
    detector = nnx.jit(lambda key: build_detector(config.model, num_classes, rngs=nnx.Rngs(key)))(key)
    if config.train.initial_weights:
        load_initial_weights(detector, Path(config.train.initial_weights))
    elif config.model.backbone.get("norm") == "frozen_batch":
        log.warning(
            "The backbone's BatchNorm is frozen, which presumes pre-trained weights, and there are none: set "
            "--config.train.initial_weights, or use a variant that trains from scratch."
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
    criterion = make_criterion(config)
    warn_of_augmentation(config)
    whole_train_set, val_set = load_training_data(config)
    train_set = whole_train_set.subset(keep_empty=config.data.keep_empty, min_side=config.data.min_side)
    plan = make_plan(config, train_set)
    config = in_steps(config, plan.steps_per_epoch)
    # Nothing is written before the settings and the data have turned out usable.
    log_to_file(workdir / "train.log")
    report_data(whole_train_set, train_set, val_set)
    max_boxes = config.data.max_boxes or max(1, *(len(record.boxes) for record in train_set.records))
    graph, state = initial_state(config, len(train_set.classes.names))
    log.info("%.1f million parameters, %.1f trained", *(_millions(s) for s in ((state.params, state.frozen), state.params)))
    log.info("batches of %d in the shapes %s", plan.batch_size, ", ".join(f"{h}x{w}" for h, w in plan.buckets))

    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    meta = Meta(to_plain(config), train_set.classes, 0, {})
    state = _resume(checkpoints, state, meta)
    start, steps = int(state.step), config.train.steps
    if start >= steps:
        log.info("Step %d of %d is done already.", start, steps)
    loader = TrainLoader(train_set, plan, max_boxes)
    batches = train_batches(loader, start, max(start, steps), config.data.threads)
    evaluator = Evaluator(config, val_set, graph)
    optimizer, settings = make_optimizer(config), config.train
    step_function = make_train_step(graph, criterion, optimizer, settings.seed, settings.padding_is_image)
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
            interval.images += len(batch.images)
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
    for section in ("data", "augmentation", "optimizer", "loss", "train"):
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
