"""Reads the sections `train` and `optimizer` of a config: the optimizer, lengths in steps, and checks of a recipe."""

import logging

from ml_collections import ConfigDict

from hpr_jax.errors import UserError
from hpr_jax.settings import AUTO
from hpr_jax.training.optimizer import Optimizer

log = logging.getLogger("hpr_jax")


def make_optimizer(config: ConfigDict) -> Optimizer:
    """The optimizer that a config asks for."""
    settings = config.optimizer
    return Optimizer(
        settings.clip_norm,
        settings.weight_decay,
        settings.backbone_multiplier,
        settings.merge_multiplier,
        settings.merge_decay,
        settings.offsets_multiplier,
    )


def in_steps(config: ConfigDict, steps_per_epoch: int) -> ConfigDict:
    """A copy of a config in which `train.steps`, `train.evaluate_every` and `optimizer.milestones` count steps.

    Runs and their checkpoints have configs like this. A config that counts steps already stays as it is.
    """
    config = config.copy_and_resolve_references()
    if not config.train.steps:
        config.train.steps, config.train.epochs = config.train.epochs * steps_per_epoch, 0
        config.train.evaluate_every *= steps_per_epoch
        config.optimizer.milestones = tuple(milestone * steps_per_epoch for milestone in config.optimizer.milestones)
    return config


def with_batch_size(config: ConfigDict, size: int) -> ConfigDict:
    """A copy of a config with a batch size."""
    config = config.copy_and_resolve_references()
    with config.train.ignore_type():
        config.train.batch_size = size
    return config


def with_recipe_batch(config: ConfigDict) -> ConfigDict:
    """The config, in which the recipe's batch size takes the place of `auto`: for what is told without a run."""
    return with_batch_size(config, config.optimizer.recipe_batch_size) if config.train.batch_size == AUTO else config


def check_batch(config: ConfigDict, devices: int) -> None:
    """Checks that a batch can be split evenly over the devices and the parts of gradient accumulation; `auto` always can.

    Raises:
      UserError: the batch size is no multiple of devices times parts.
    """
    size, parts = config.train.batch_size, config.train.accumulation_steps
    if size != AUTO and size % (devices * parts):
        raise UserError(
            f"config.train.batch_size is {size}; with {devices} {'device' if devices == 1 else 'devices'} and "
            f"config.train.accumulation_steps {parts} it must be a multiple of {devices * parts}."
        )


def check_matching(matching: str, platform: str) -> None:
    """Checks that what solves the matching problems runs on the platform of the devices.

    Raises:
      UserError: the kernel was asked for by name, and there is no GPU.
    """
    if matching == "pallas" and platform != "gpu":
        raise UserError(
            f"config.train.matching 'pallas' needs an NVIDIA GPU, and JAX has found only the platform {platform}; set it to "
            "'auto'."
        )


def advice_on_dtype(dtype: str, platform: str) -> str | None:
    """What to think about where the type of activations does not suit the platform, as a sentence; None where it does."""
    if platform == "gpu" and dtype == "float32":
        return "Activations are float32; on GPUs, --config.compute.dtype=bfloat16 is faster and takes less memory."
    if platform == "cpu" and dtype == "bfloat16":
        return "Activations are bfloat16, which CPUs compute slowly; --config.compute.dtype=float32 is faster there."
    return None


def warn_of_recipe(config: ConfigDict) -> None:
    """Warns about settings that are valid but probably mistakes."""
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
    milestones = config.optimizer.milestones if config.optimizer.schedule == "milestones" else ()
    if milestones and not length / 10 <= max(milestones) < length:
        log.warning(
            "The learning rate falls at %s, and the length is %d %s: config.optimizer.milestones and "
            "config.train.evaluate_every must count %s, too.",
            ", ".join(map(str, milestones)),
            length,
            unit,
            unit,
        )
