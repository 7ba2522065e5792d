"""Goes on with a run from its latest checkpoint.

What the run depends on is compared with what it depended on when it was saved. So it ends as if it had never stopped, or is
refused.
"""

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
from hpr_jax.training.state import TrainState, evaluation_variables, training_arrays
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.checkpoint_writer import Checkpoints

log = logging.getLogger("hpr_jax")

# Settings that may change when a run goes on: they leave its result as it is, except for the last bits.
FREE = (
    "compute.operations",
    "compute.remat",
    "data.directory",
    "data.patience",
    "data.threads",
    "data.workers",
    "optimizer.recipe_batch_size",
    "train.accumulation_steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.matching",
    "train.plots",
    "train.wandb",
)


def dependencies(train: Dataset, val: Dataset) -> dict[str, Any]:
    """What a run depends on beside its config, as JSON values: its data, and the machine for the last bits."""
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
    """Compares a run with the one that left a checkpoint; logs what differs and may differ.

    Args:
      found: of the checkpoint.
      now: of the run that is about to go on.
      accept_changes: lets other settings and other data pass, with a warning.

    Raises:
      UserError: the runs differ in model or classes, or in settings or data without `accept_changes`.
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
            key, _, _ = difference.partition(" ")
            if key in FREE:
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
    """Checks that all processes have the same config, classes and data.

    Raises:
      UserError: one process differs from process 0.
    """
    first, *others = gather([meta.config, list(meta.classes.names), meta.run["data"]])
    for number, other in enumerate(others, start=1):
        if other != first:
            different = differences(first[0], other[0], "config.") or ["the data set"]
            raise UserError(f"Process {number} differs from process 0 in {', '.join(different)}; start all with the same.")


@dataclasses.dataclass
class Progress:
    """What a run must remember beside its state; checkpoints have it in their meta data.

    Attributes:
      losses: those of the steps since the last line of the log.
      reports: number of reports about the data so far, in all processes together.
      reference: the metric that evaluations must gain on; None before the first one.
      stale: number of evaluations in a row that together have not gained enough on it.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    reports: int = 0
    reference: float | None = None
    stale: int = 0

    def note_evaluation(self, value: float, min_gain: float) -> None:
        """Counts an evaluation: as stale if its metric is no more than `min_gain` above the reference, else it is the new
        reference."""
        if self.reference is None or value > self.reference + min_gain:
            self.reference, self.stale = value, 0
        else:
            self.stale += 1


def resume(checkpoints: Checkpoints, state: TrainState, meta: Meta, accept_changes: bool) -> tuple[TrainState, Progress]:
    """The state and progress of a run's latest checkpoint, or the given state if there is none.

    Args:
      state: a new run's.
      meta: of the run that is about to begin or go on.
      accept_changes: as in `check_same_run`, which decides whether the run may go on.

    Raises:
      UserError: the checkpoint is of another run, or all checkpoints are damaged.
    """
    found = checkpoints.latest_meta()
    # A run that evaluated before its first checkpoint has a best one alone.
    earlier = found or checkpoints.best_meta()
    if earlier is not None:
        check_same_run(earlier, meta, accept_changes)
    if found is None:
        if earlier is not None:
            log.warning(
                "The workdir has a best checkpoint, of step %d, and none to go on from: it begins anew.", earlier.step
            )
        return state, Progress()
    # A moving average may be switched on or off when a run goes on: `stored` has one if the checkpoint has.
    averaged = found.config["train"]["ema_decay"] > 0
    stored = dataclasses.replace(state, average=jax.tree.map(lambda x: x, state.params) if averaged else None)
    model, training = checkpoints.restore(found.step, evaluation_variables(stored), training_arrays(stored))
    evaluated_params, frozen = nnx.split_state(model, nnx.Param, ...)
    log.info("Goes on from step %d.", found.step)
    params = evaluated_params
    if averaged:
        params = stored.params
        nnx.replace_by_pure_dict(params, training["params"])
    average = None
    if state.average is not None:
        # An average that is switched on begins with the parameters, as a copy: a step overwrites both.
        average = evaluated_params if averaged else jax.tree.map(jnp.copy, params)
    state = TrainState(training["step"], params, frozen, training["optimizer"], average)
    return state, Progress(**found.run.get("progress", {}))
