"""AdamW as the official recipes set it up."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def learning_rate_schedule(settings: Mapping[str, Any]) -> Callable[[jax.Array | int], jax.Array]:
    """Linear warm-up from `warmup_factor`, then a factor `gamma` at each milestone."""
    peak, warmup, factor = settings["learning_rate"], settings["warmup_steps"], settings["warmup_factor"]

    def schedule(step):
        ramp = factor + (1 - factor) * jnp.minimum(step / warmup, 1.0) if warmup else 1.0
        passed = sum(jnp.where(step >= milestone, 1, 0) for milestone in settings["milestones"])
        return peak * ramp * settings["gamma"] ** passed

    return schedule


def make_optimizer(settings: Mapping[str, Any]) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, weight decay on every tensor, a lower learning rate for the backbone."""
    return optax.chain(
        optax.clip_by_global_norm(settings["clip_norm"]) if settings["clip_norm"] else optax.identity(),
        optax.scale_by_adam(),
        optax.add_decayed_weights(settings["weight_decay"]),
        _scale_backbone(settings["backbone_multiplier"]),
        optax.scale_by_learning_rate(learning_rate_schedule(settings)),
    )


def _scale_backbone(multiplier: float) -> optax.GradientTransformation:
    def scale(path, update):
        return update * multiplier if path[0].key == "backbone" else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
