"""What training changes, and how it begins."""

from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from hpr_jax.models.build import random_detector
from hpr_jax.runtime.devices import EVERYWHERE, replicate
from hpr_jax.training.build import make_optimizer
from hpr_jax.weights.initial import load_initial_weights


@flax.struct.dataclass
class TrainState:
    """What a step changes, and the variables that it does not (`frozen`).

    Attributes:
      average: moving average of the parameters, or None.
    """

    step: jax.Array
    params: nnx.State
    frozen: nnx.State
    optimizer: Any
    average: nnx.State | None = None


def initial_state(
    config: ConfigDict, num_classes: int, mesh: Mesh, weights: Path | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """A new detector, split into its structure and its state, which is on every device.

    Args:
      weights: a file or folder of weights to begin with; None: random ones.
    """
    detector = random_detector(config.model, num_classes, compute=config.compute, seed=config.train.seed)
    if weights is not None:
        load_initial_weights(detector, weights)
    graph, params, frozen = nnx.split(detector, nnx.Param, ...)
    params, frozen = replicate(mesh, (params, frozen))
    everywhere = NamedSharding(mesh, EVERYWHERE)
    moments = jax.jit(make_optimizer(config).init, out_shardings=everywhere)(params)
    average = jax.tree.map(jnp.copy, params) if config.train.ema_decay else None
    return graph, TrainState(replicate(mesh, np.int32(0)), params, frozen, moments, average)


def evaluated(state: TrainState) -> nnx.State:
    """The variables that evaluation takes: the average of the parameters, if there is one."""
    return nnx.merge_state(state.params if state.average is None else state.average, state.frozen)


def training_arrays(state: TrainState) -> dict[str, Any]:
    """What a run goes on from beside what is evaluated."""
    training = {"optimizer": state.optimizer, "step": state.step}
    return training if state.average is None else {**training, "params": nnx.to_pure_dict(state.params)}
