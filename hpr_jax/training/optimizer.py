"""AdamW as the official recipes set it up."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree


def learning_rate(settings: Mapping[str, Any], step: int, steps: int) -> float:
    """Linear warm-up from `warmup_factor`, then a factor `gamma` at each milestone, or a cosine to `gamma` at the end.

    Of the `warmup_steps` the first has the factor, and the last the full rate, as in the official schedule.

    Args:
      settings: the section `optimizer`; milestones count steps.
      step: counted from 0.
      steps: of the whole run.
    """
    warmup, factor = settings["warmup_steps"], settings["warmup_factor"]
    ramp = factor + (1 - factor) * min(step / max(warmup - 1, 1), 1.0) if warmup else 1.0
    if settings["schedule"] == "cosine":
        progress = max(step - warmup, 0) / max(steps - 1 - warmup, 1)
        fall = settings["gamma"] + (1 - settings["gamma"]) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    else:
        fall = settings["gamma"] ** sum(step >= milestone for milestone in settings["milestones"])
    return settings["learning_rate"] * ramp * fall


# The attributes through which a module has the layer that says where its deformable attention samples.
_OFFSETS = ("attention", "offsets")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with clipping by global norm, decay on every tensor, and a lower learning rate for the backbone.

    Attributes:
      clip_norm: longest gradient, all tensors together; longer ones are scaled down.
      backbone_multiplier: factor of the backbone's learning rate.
      merge_multiplier: factor of the learning rate of the merges' weights.
      merge_decay: whether the weights of the merges decay, too.
      offsets_multiplier: factor of the learning rate of the layers that say where deformable attention samples.
    """

    clip_norm: float
    weight_decay: float
    backbone_multiplier: float
    merge_multiplier: float = 1.0
    merge_decay: bool = True
    offsets_multiplier: float = 1.0

    def init(self, params: Any) -> Any:
        """The state before the first step, moments of zero."""
        return self._adamw().init(params)

    def update(self, gradients: Any, state: Any, params: Any, learning_rate: jax.Array | float) -> tuple[Any, Any]:
        """Takes one step; returns the new parameters and the new state."""
        updates, state = self._adamw().update(gradients, state, params)

        def add(path, param, update):
            keys = [str(getattr(part, "key", part)) for part in path]
            if any(key.startswith("merge_") for key in keys):
                if not self.merge_decay:
                    update = update - self.weight_decay * param
                return param - self.merge_multiplier * learning_rate * update
            slower = self.backbone_multiplier if keys[0] == "backbone" else 1.0
            if _OFFSETS in zip(keys, keys[1:]):
                slower = self.offsets_multiplier
            return param - slower * learning_rate * update

        return jax.tree_util.tree_map_with_path(add, params, updates), state

    def _adamw(self) -> optax.GradientTransformation:
        # Each moment is one vector of all tensors in the order of their names, since hundreds of tensors with a dozen
        # operations each would take as long to compile as the model. That order is part of the format of checkpoints.
        return optax.flatten(
            optax.chain(
                optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
                optax.scale_by_adam(),
                optax.add_decayed_weights(self.weight_decay),
            )
        )


def moving_average(average: Any, params: Any, decay: float, step: jax.Array | int) -> Any:
    """The next moving average of parameters, after step `step` (counted from 0).

    The decay is at most (1 + step) / (10 + step), so that early steps forget the random beginning faster.
    """
    used = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1 - used) * (p - a), average, params)


def global_norm(gradients: Any) -> jax.Array:
    """Norm of all gradients together."""
    return jnp.linalg.norm(ravel_pytree(gradients)[0])
