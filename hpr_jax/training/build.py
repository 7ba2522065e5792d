"""From a config to the parts of a training run."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from hpr_jax.data.augmentation.copy_paste import MAX_PASTED
from hpr_jax.data.augmentation.geometry import Geometry, draw_large_scale, draw_weak
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.loading.plan import Shape, TrainPlan, choose_buckets
from hpr_jax.errors import UserError
from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.dense import DenseLoss
from hpr_jax.losses.matched import AlignedMatchedLoss
from hpr_jax.training.optimizer import Optimizer

log = logging.getLogger("hpr_jax")


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


def in_steps(config: ConfigDict, steps_per_epoch: int) -> ConfigDict:
    """A copy of the config whose length, milestones and evaluation interval count steps; for a run and its checkpoints."""
    config = config.copy_and_resolve_references()
    if not config.train.steps:
        config.train.steps, config.train.epochs = config.train.epochs * steps_per_epoch, 0
        config.train.evaluate_every *= steps_per_epoch
        config.optimizer.milestones = tuple(milestone * steps_per_epoch for milestone in config.optimizer.milestones)
    return config


def check_batch(config: ConfigDict, devices: int) -> None:
    """Looks whether a batch can be split.

    Raises:
      UserError: it cannot.
    """
    size, parts = config.train.batch_size, config.train.accumulation_steps
    if size % (devices * parts):
        raise UserError(
            f"config.train.batch_size is {size}; with {devices} {'device' if devices == 1 else 'devices'} and "
            f"config.train.accumulation_steps {parts} it must be a multiple of {devices * parts}."
        )


def warn_of_recipe(config: ConfigDict) -> None:
    """Says what of a recipe hardly is meant."""
    side, canvas = config.augmentation.lsj.side, config.evaluate.canvas
    if config.augmentation.kind == "lsj" and canvas != side:
        log.warning(
            "Large-scale jitter trains on grey canvases of side %d, and config.evaluate.canvas is %d: set it, "
            "config.evaluate.side and config.evaluate.max_side to %d, too.",
            side,
            canvas,
            side,
        )
    length, unit = config.train.steps or config.train.epochs, "steps" if config.train.steps else "epochs"
    milestones = config.optimizer.milestones
    if milestones and not length / 10 <= max(milestones) < length:
        log.warning(
            "The learning rate falls at %s, and the length is %d %s: config.optimizer.milestones and "
            "config.train.evaluate_every must count %s, too.",
            ", ".join(map(str, milestones)),
            length,
            unit,
            unit,
        )


def wants_masks(config: ConfigDict) -> bool:
    """Whether training wants the masks of its data set."""
    return config.augmentation.kind == "lsj" and config.augmentation.lsj.copy_paste


def make_plan(config: ConfigDict, dataset: Dataset) -> TrainPlan:
    """The batches of a run; its buckets suit the sizes of a trial epoch."""
    settings, sizes, batch_size = config.augmentation, dataset.sizes, config.train.batch_size
    if len(dataset) < batch_size:
        raise UserError(
            f"{dataset.name} has {len(dataset)} images to train on, fewer than config.train.batch_size "
            f"{batch_size}; lower it, or set --config.data.keep_empty=True if images without objects shall count."
        )
    draw = functools.partial(_draw(settings), sizes, settings.to_dict())
    trial = np.array([g.size for g in draw(np.random.default_rng((config.train.seed, 2**31)))])
    buckets = choose_buckets(trial, config.data.buckets, [] if settings.kind == "lsj" else _largest(settings, sizes))
    return TrainPlan(draw, len(dataset), batch_size=batch_size, buckets=buckets, seed=config.train.seed)


def _draw(settings: ConfigDict) -> Callable[..., list[Geometry]]:
    return draw_large_scale if settings.kind == "lsj" else draw_weak


def _largest(settings: ConfigDict, sizes: np.ndarray) -> list[Shape]:
    """The largest sizes that any epoch can draw; crops come in both orientations."""
    side, max_side = max(settings.sides), settings.max_side
    crops, landscape = settings.crop > 0, sizes[:, 0] <= sizes[:, 1]
    largest = [(min(side, max_side), max_side)] * bool(crops or landscape.any())
    return largest + [(max_side, min(side, max_side))] * bool(crops or not landscape.all())


def make_views(config: ConfigDict, dataset: Dataset) -> ViewMaker:
    """How the views of an image are made; says if copy-paste cannot be had."""
    settings, draw_donor = config.augmentation, None
    if wants_masks(config):
        masked, count = dataset.count_masks()
        if not masked:
            log.warning(
                "%s has no masks: nothing is copied and pasted. Give its annotations a segmentation, or set "
                "--config.augmentation.lsj.copy_paste=False.",
                dataset.name,
            )
        else:
            draw_donor = functools.partial(draw_large_scale, settings=settings.to_dict())
            if masked < count:
                log.warning("%d of %d objects have no mask: they are trained on, but not pasted.", count - masked, count)
    return ViewMaker(dataset, strong=settings.strong_views, drop_vanished=settings.drop_vanished, draw_donor=draw_donor)


def room_for_boxes(config: ConfigDict, dataset: Dataset, make_views: ViewMaker) -> int:
    """Boxes that every view has room for."""
    most = max(1, int(dataset.records.counts.max()))
    pasted = min(most, MAX_PASTED - 1) if make_views.draw_donor else 0
    return config.data.max_boxes or most + pasted
