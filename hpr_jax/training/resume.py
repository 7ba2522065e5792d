"""How a run goes on: what it depends on is compared, so that it ends as if it had never stopped, or is refused."""

import dataclasses
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.config import differences
from hpr_jax.data.dataset import Dataset
from hpr_jax.errors import UserError
from hpr_jax.runtime.devices import gather
from hpr_jax.training.checkpoints import Checkpoints
from hpr_jax.training.state import TrainState, evaluated, training_arrays
from hpr_jax.weights.checkpoint import Meta

log = logging.getLogger("hpr_jax")

# Settings that leave the result as it is, but for the last bits.
FREE = (
    "compute.operations",
    "compute.remat",
    "data.directory",
    "data.threads",
    "data.workers",
    "train.accumulation_steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


def dependencies(train: Dataset, val: Dataset) -> dict[str, Any]:
    """What a run depends on beside its config, JSON types."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "data": {"training split": train.fingerprint, "validation split": val.fingerprint},
        "machine": {
            "devices": jax.device_count(),
            "kind of device": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
            "CPU cores": threads,
            "JAX": jax.__version__,
        },
    }


def check_same_run(found: Meta, now: Meta, accept_changes: bool) -> None:
    """Compares a run with the one that left a checkpoint.

    Raises:
      UserError: of another model or other classes, or, unless changes are accepted, of other settings or data.
    """
    different = differences(found.config["model"], now.config["model"], "config.model.")
    if found.classes != now.classes:
        different.append("the classes of the data set")
    if different:
        raise UserError(
            f"The workdir holds a run of another model, which differs in {', '.join(different)}; choose another workdir."
        )
    changed = []
    for section in ("compute", "data", "augmentation", "optimizer", "loss", "train", "evaluate"):
        for difference in differences(found.config[section], now.config[section], f"{section}."):
            if difference.partition(" ")[0] in FREE:
                log.info("Goes on with another setting: config.%s.", difference)
            else:
                changed.append(f"config.{difference}")
    data = found.run.get("data", {})
    changed += [f"the {split} of the data set" for split in data if data[split] != now.run["data"][split]]
    if changed and not accept_changes:
        raise UserError(
            f"The workdir holds a run that differs in {', '.join(changed)}. Choose another workdir, or go on all the same "
            "with --accept-changes."
        )
    for change in changed:
        log.warning("Goes on with another setting than the run began with: %s.", change)
    machine = differences(found.run.get("machine", {}), now.run["machine"])
    if machine:
        log.warning("Goes on elsewhere: %s. The last bits of the result depend on these.", ", ".join(machine))


def check_same_everywhere(meta: Meta) -> None:
    """Looks whether all processes are about to do the same.

    Raises:
      UserError: one has another config or other data than the first.
    """
    first, *others = gather([meta.config, list(meta.classes.names), meta.run["data"]])
    for number, other in enumerate(others, start=1):
        if other != first:
            different = differences(first[0], other[0], "config.") or ["the data set"]
            raise UserError(f"Process {number} differs from process 0 in {', '.join(different)}; start all with the same.")


@dataclasses.dataclass
class Progress:
    """What a run knows beside its state.

    Attributes:
      losses: of the steps since the last line of the log.
      reports: sentences about the data so far, in all processes.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    reports: int = 0


def resume(checkpoints: Checkpoints, state: TrainState, meta: Meta, accept_changes: bool) -> tuple[TrainState, Progress]:
    """A run's latest checkpoint, or the given state if there is none; raises as `check_same_run` does."""
    found = checkpoints.latest_meta()
    # A run may have had its best before its first checkpoint.
    earlier = found or checkpoints.best_meta()
    if earlier is not None:
        check_same_run(earlier, meta, accept_changes)
    if found is None:
        return state, Progress()
    # A moving average may have been switched on or off meanwhile.
    averaged = found.config["train"]["ema_decay"] > 0
    stored = state.replace(average=jax.tree.map(lambda x: x, state.params) if averaged else None)
    model, training = checkpoints.restore(found.step, evaluated(stored), training_arrays(stored))
    params, frozen = nnx.split_state(model, nnx.Param, ...)
    log.info("Goes on from step %d.", found.step)
    average = params
    if averaged:
        params = stored.params
        nnx.replace_by_pure_dict(params, training["params"])
    elif state.average is not None:
        average = jax.tree.map(jnp.copy, params)
    average = None if state.average is None else average
    state = TrainState(training["step"], params, frozen, training["optimizer"], average)
    return state, Progress(**found.run.get("progress", {}))
