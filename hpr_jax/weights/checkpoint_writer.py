"""Writes the checkpoints of a run, deletes old ones, and puts damaged ones aside. weights/checkpoint.py has their format."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from hpr_jax.errors import RunError, UserError
from hpr_jax.runtime.devices import agree, gather, is_main_process, wait_for_all
from hpr_jax.weights.checkpoint import Meta, checkpoint_damage, open_reader, read_meta
from hpr_jax.weights.find_checkpoint import BEST, DAMAGED, LATEST, PARTIAL, checkpoints_in, entries
from hpr_jax.weights.manifest import write_manifest

log = logging.getLogger("hpr_jax")


class Checkpoints:
    """The checkpoints of one run, below its workdir.

    A checkpoint gets its final name when it is complete, and has a manifest by which damage is found. All processes of a run
    call every method, and see the same files.

    Args:
      keep: how many of the latest checkpoints are kept.
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir
        self._latest, self._best, self._keep = (workdir / LATEST).resolve(), (workdir / BEST).resolve(), keep
        if is_main_process():
            _delete_partial(self._latest)
            _delete_partial(self._best)
            # If a run was killed between saving and deleting, two remain: delete the older.
            _delete_now(checkpoints_in(self._best)[:-1])

    def save(self, step: int, model: nnx.State, training: Any, meta: Meta) -> None:
        """Saves a checkpoint to resume from, then deletes the oldest ones.

        Args:
          step: number of training steps that were taken.
          model: the variables that evaluation takes.
          training: what else a run needs to go on, a tree of arrays.
          meta: what the checkpoint says of itself.

        Raises:
          RunError: the checkpoint cannot be written; the earlier ones are as they were.
        """
        _write(self._latest / str(step), meta, model=nnx.to_pure_dict(model), training=training)
        _delete(checkpoints_in(self._latest)[: -self._keep])

    def save_best(self, step: int, model: nnx.State, meta: Meta) -> None:
        """Saves the best model so far in place of the earlier one; raises as `save` does."""
        _write(self._best / str(step), meta, model=nnx.to_pure_dict(model))
        _delete([path for path in checkpoints_in(self._best) if path.name != str(step)])

    def latest_meta(self) -> Meta | None:
        """What the newest undamaged checkpoint says of itself; None before the first. Puts damaged checkpoints aside.

        Raises:
          UserError: there are checkpoints, and all are damaged.
        """
        newest, damaged = _newest_undamaged(self._latest)
        if newest is None and damaged:
            raise UserError(
                f"All checkpoints in {self._latest} are damaged: {', '.join(damaged)}. To begin anew, choose another "
                "workdir or delete them."
            )
        return None if newest is None else read_meta(newest, verify=False)

    def best_meta(self) -> Meta | None:
        """What the best checkpoint says of itself; None if there is no undamaged one."""
        newest, _ = _newest_undamaged(self._best)
        return None if newest is None else read_meta(newest, verify=False)

    def restore(self, step: int, model: nnx.State, training: Any) -> tuple[nnx.State, Any]:
        """The model and the training arrays of the checkpoint of a step, with the given ones' shapes, types and devices."""
        path = self._latest / str(step)
        with open_reader(path) as reader:
            restored = reader.restore(
                path,
                args=ocp.args.Composite(
                    model=ocp.args.StandardRestore(_placed(nnx.to_pure_dict(model))),
                    training=ocp.args.StandardRestore(_placed(training)),
                ),
            )
        nnx.replace_by_pure_dict(model, restored.model)
        return model, restored.training


def _write(path: Path, meta: Meta, **items: Any) -> None:
    """Writes a checkpoint under a partial name, which becomes `path` when it is complete; raises as `save` does."""
    partial = path.with_suffix(PARTIAL)
    arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    reason = None
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save(partial, ocp.args.Composite(meta=ocp.args.JsonSave(meta.to_json()), **arrays), force=True)
        if is_main_process():
            write_manifest(partial)
            _delete_now([path] if path.exists() else [])
            partial.rename(path)
    except Exception as error:
        # Orbax raises errors of any type.
        reason = _reason(error)
    # Collecting the reasons of all processes also waits until all have written.
    reasons = [one for one in gather(reason) if one]
    if reasons:
        _delete_partial(path.parent)
        raise RunError(
            f"The checkpoint {path} cannot be written: {reasons[0]}. Earlier checkpoints are as they were; the same command "
            "goes on from the latest."
        )


def _delete(paths: Iterable[Path]) -> None:
    if is_main_process():
        _delete_now(paths)
    wait_for_all("deleted")


def _delete_now(paths: Iterable[Path]) -> None:
    for path in paths:
        # Deleting takes a while: under this name, what is left of it after a kill is no checkpoint.
        shutil.rmtree(path.rename(path.with_suffix(f"{PARTIAL}-old")))


def _newest_undamaged(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and the names of all that were put aside, now or earlier.

    One process looks for all of them, as the others may not see the same files yet.
    """

    def look() -> tuple[str | None, list[str]]:
        while steps := checkpoints_in(folder):
            newest = steps[-1]
            damage = checkpoint_damage(newest)
            if not damage:
                break
            aside = newest.with_suffix(DAMAGED)
            log.warning("The checkpoint %s is damaged (%s): it is now %s, and not used.", newest, damage, aside.name)
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            newest.rename(aside)
        return steps[-1].name if steps else None, sorted(path.name for path in entries(folder) if path.suffix == DAMAGED)

    name, damaged = agree(look)
    return folder / name if name else None, damaged


def _delete_partial(folder: Path) -> None:
    """Deletes what a killed run left half written or half deleted."""
    for left in folder.glob(f"*{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _reason(error: Exception) -> str:
    """The reason for an error in a few words, to end a sentence with: libraries quote one another over many lines."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "no space is left on the device" if "No space left" in str(error) else text


def _placed(tree: Any) -> Any:
    """Abstract arrays with the shapes, types and devices of the given ones."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
