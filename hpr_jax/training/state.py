"""The state of training, and how a run begins."""

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
    """What a step changes, and the variables of the detector that it does not change.

    Attributes:
      step: int32 `[]`, number of steps that were taken.
      params: trained variables of the detector.
      frozen: all other variables of the detector.
      optimizer: state of the optimizer.
      average: moving average of `params`, or None if the config asks for none.
    """

    step: jax.Array
    params: nnx.State
    frozen: nnx.State
    optimizer: Any
    average: nnx.State | None = None


def initial_state(
    config: ConfigDict, num_classes: int, mesh: Mesh, weights: Path | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """A new detector, split into its structure and the state of training, which is on every device.

    Args:
      weights: a file or folder of weights to begin with; None: random weights.

    Raises:
      UserError: the weights cannot be read, or do not fit the config.
    """
    detector = random_detector(config.model, num_classes, compute=config.compute, seed=config.train.seed)
    if weights is not None:
        load_initial_weights(detector, weights)
    graph, variables = nnx.split(detector)
    params, frozen = replicate(mesh, nnx.split_state(variables, nnx.Param, ...))
    everywhere = NamedSharding(mesh, EVERYWHERE)
    moments = jax.jit(make_optimizer(config).init, out_shardings=everywhere)(params)
    average = jax.tree.map(jnp.copy, params) if config.train.ema_decay else None
    return graph, TrainState(replicate(mesh, np.int32(0)), params, frozen, moments, average)


def evaluation_variables(state: TrainState) -> nnx.State:
    """The variables of the detector for evaluation: the average of the parameters, where there is one, in their place."""
    return nnx.merge_state(state.params if state.average is None else state.average, state.frozen)


def training_arrays(state: TrainState) -> dict[str, Any]:
    """What a run needs to go on beside its evaluation variables."""
    training = {"optimizer": state.optimizer, "step": state.step}
    return training if state.average is None else {**training, "params": nnx.to_pure_dict(state.params)}
