"""From a config to the parts of a training run."""

import dataclasses
import functools
import logging

import numpy as np
from ml_collections import ConfigDict

from hpr_jax.data.coco import CocoDataset
from hpr_jax.data.plan import TrainPlan, choose_buckets
from hpr_jax.data.transforms import draw_weak
from hpr_jax.errors import UserError
from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.dense import DenseLoss
from hpr_jax.losses.matched import AlignedMatchedLoss
from hpr_jax.optimizer import Optimizer

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


def warn_of_recipe(config: ConfigDict) -> None:
    """Says what of a recipe cannot be had, and what hardly is meant.

    Raises:
      UserError: training would make no sense.
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
