"""Orbax checkpoints: the latest ones of a run, and its best one apart from them.

A checkpoint is a directory with the items `model` (all variables that evaluation takes), `training` (what else a run goes on
from; not in best ones) and `meta` (JSON: config, classes, step, metrics, what the run depends on), and a manifest.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.config import check, differences, from_plain, override, to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import RunError, UserError
from hpr_jax.models.build import Compute, build_detector
from hpr_jax.models.detector import Detector
from hpr_jax.runtime.devices import agree, gather, leads, wait_for_all
from hpr_jax.weights.manifest import find_damage, write_manifest

LATEST, BEST = "checkpoints", "best"
# Of the names of folders that are being written or deleted.
PARTIAL = ".partial"

# Settings that the first checkpoints do not name, with the values that mean what was done then.
LATER = {
    "train": {"accumulation_steps": 1, "ema_decay": 0.0},
    "data": {"workers": 0, "train_split": "train", "val_split": "validation"},
}

log = logging.getLogger("hpr_jax")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    Attributes:
      run: what a run that goes on from it must know beside its arrays, JSON types.
    """

    config: dict[str, Any]
    classes: Classes
    step: int
    metrics: dict[str, float]
    run: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "class_names": list(self.classes.names),
            "category_ids": list(self.classes.category_ids),
            "step": self.step,
            "metrics": self.metrics,
            "run": self.run,
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Meta":
        classes = Classes(tuple(content["class_names"]), tuple(content["category_ids"]))
        return Meta(_current(content["config"]), classes, content["step"], content["metrics"], content.get("run", {}))


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config as configs are now: it may lack what came later. Once, how to compute was part of the model, and
    views were weak alone."""
    config = {section: {**LATER.get(section, {}), **values} for section, values in config.items()}
    if "compute" in config:
        return config
    model = {key: value for key, value in config["model"].items() if key != "remat"}
    model["backbone"] = {key: value for key, value in model["backbone"].items() if key != "remat"}
    lsj = {"side": 1024, "scale_range": [0.1, 2.0], "copy_paste": True}
    augmentation = {"lsj": lsj, "drop_vanished": False, **config["augmentation"], "strong_views": False}
    compute = {**dataclasses.asdict(Compute()), "remat": list(Compute().remat)}
    return {**config, "model": model, "compute": compute, "augmentation": augmentation}


class Checkpoints:
    """The checkpoints of one run, below its workdir. A checkpoint has its final name when it is complete, never before, and
    a manifest by which damage is found. All processes call every method, and see the same files.

    Args:
      keep: so many latest ones.
    """

    def __init__(self, workdir: Path, keep: int):
        self._latest, self._best, self._keep = (workdir / LATEST).resolve(), (workdir / BEST).resolve(), keep
        if leads():
            _delete_partial(self._latest)
            _delete_partial(self._best)
            # Of two, the older was about to be deleted.
            _delete_now(_steps(self._best)[:-1])

    def save(self, step: int, model: nnx.State, training: Any, meta: Meta) -> None:
        """Saves a checkpoint to resume from, then deletes the oldest.

        Raises:
          RunError: it cannot be written; the others are as they were.
        """
        _write(self._latest / str(step), meta, model=nnx.to_pure_dict(model), training=training)
        _delete(_steps(self._latest)[: -self._keep])

    def save_best(self, step: int, model: nnx.State, meta: Meta) -> None:
        """Saves the best model so far, in place of the one before; raises as `save` does."""
        _write(self._best / str(step), meta, model=nnx.to_pure_dict(model))
        _delete([path for path in _steps(self._best) if path.name != str(step)])

    def latest_meta(self) -> Meta | None:
        """What the newest undamaged checkpoint says of itself, or None before the first. Damaged ones are put aside.

        Raises:
          UserError: all are damaged.
        """
        newest, damaged = _newest_undamaged(self._latest)
        if newest is None and damaged:
            raise UserError(
                f"All checkpoints in {self._latest} are damaged: {', '.join(damaged)}. To begin anew, choose another "
                "workdir or delete them."
            )
        return newest and read_meta(newest, check=False)

    def best_meta(self) -> Meta | None:
        """What the best checkpoint says of itself, None if there is none that is undamaged."""
        newest, _ = _newest_undamaged(self._best)
        return newest and read_meta(newest, check=False)

    def restore(self, step: int, model: nnx.State, training: Any) -> tuple[nnx.State, Any]:
        """The model and training state of a step, in the shapes and on the devices of the given ones."""
        path = self._latest / str(step)
        with _reader(path) as reader:
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
    partial = path.with_suffix(PARTIAL)
    arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    reason = None
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save(partial, ocp.args.Composite(meta=ocp.args.JsonSave(meta.to_json()), **arrays), force=True)
        if leads():
            write_manifest(partial)
            _delete_now([path] if path.exists() else [])
            partial.rename(path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = _reason(error)
    # Also waits for all.
    reasons = [one for one in gather(reason) if one]
    if reasons:
        _delete_partial(path.parent)
        raise RunError(
            f"The checkpoint {path} cannot be written: {reasons[0]}. Earlier checkpoints are as they were; the same command "
            "goes on from the latest."
        )


def _delete(paths: Iterable[Path]) -> None:
    if leads():
        _delete_now(paths)
    wait_for_all("deleted")


def _delete_now(paths: Iterable[Path]) -> None:
    for path in paths:
        # What is being deleted does not look like a checkpoint.
        shutil.rmtree(path.rename(path.with_suffix(f"{PARTIAL}-old")))


def _newest_undamaged(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and the names of those that were put aside, now or before. One process looks,
    for all: they may not see the same files yet."""

    def look() -> tuple[str | None, list[str]]:
        while steps := _steps(folder):
            newest = steps[-1]
            damage = find_damage(newest)
            if not damage:
                break
            aside = newest.with_suffix(".damaged")
            log.warning("The checkpoint %s is damaged (%s): it is now %s, and not used.", newest, damage, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            newest.rename(aside)
        return steps[-1].name if steps else None, sorted(path.name for path in folder.glob("*.damaged"))

    name, damaged = agree(look)
    return folder / name if name else None, damaged


def _delete_partial(folder: Path) -> None:
    for left in folder.glob(f"*{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("*") if path.name.isdigit() and (path / "meta").is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def _reason(error: Exception) -> str:
    """The end of a message that may quote others."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "no space is left on the device" if "No space left" in str(error) else text


def find_checkpoint(path: Path) -> Path:
    """A checkpoint directory, the newest below a directory of checkpoints, or the best (else newest) of a workdir.

    Raises:
      UserError: there is none.
    """
    if (path / "model").is_dir() and (path / "meta").is_dir():
        return path
    for folder in (path / BEST, path / LATEST, path):
        if steps := _steps(folder):
            return steps[-1]
    raise UserError(f"There is no checkpoint in {path}; give a run's workdir or one checkpoint's directory.")


def read_meta(path: Path, *, check: bool = True) -> Meta:
    """What a checkpoint says of itself.

    Args:
      check: looks for damage first.

    Raises:
      UserError: no checkpoint there, or one that is damaged or cannot be read.
    """
    path = find_checkpoint(Path(path)).resolve()
    damage = find_damage(path) if check else None
    if damage:
        raise UserError(f"The checkpoint {path} is damaged: {damage}.")
    with _reader(path) as reader:
        return Meta.from_json(reader.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)


def load_detector(path: Path, compute: Mapping[str, Any] | None = None) -> tuple[Detector, Meta]:
    """The detector of a checkpoint, and what the checkpoint says of itself; raises as `read_meta` does.

    Args:
      compute: how it shall compute (see `hpr_jax.models.build.Compute`), whatever it did in training; None: by default.
    """
    path = find_checkpoint(Path(path)).resolve()
    meta = read_meta(path)
    with _reader(path) as reader:
        detector = abstract_detector(from_plain(meta.config).model, len(meta.classes.names), compute)
        state = nnx.state(detector)
        restored = reader.restore(
            path, args=ocp.args.Composite(model=ocp.args.StandardRestore(_on_first_device(nnx.to_pure_dict(state))))
        )
    nnx.replace_by_pure_dict(state, restored.model)
    nnx.update(detector, state)
    return detector, meta


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[ocp.Checkpointer]:
    """Reads one checkpoint; what goes wrong becomes a sentence."""
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            yield reader
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The checkpoint {path} is of another version of this project: {error}.") from error
    except (ValueError, OSError) as error:
        raise UserError(f"The checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error


def checkpoint_config(meta: Meta, overrides: Iterable[tuple[str, str]], config: ConfigDict | None = None) -> ConfigDict:
    """A checkpoint's config, or `config` in its place, with overrides (dotted key, text).

    Raises:
      UserError: the model is not the checkpoint's.
    """
    config = from_plain(meta.config) if config is None else config
    for key, text in overrides:
        override(config, key, text)
    different = differences(meta.config["model"], to_plain(config)["model"], "config.model.")
    if different:
        raise UserError(f"The checkpoint is of another model: {', '.join(different)}.")
    check(config)
    return config


def abstract_detector(
    model_config: Mapping[str, Any], num_classes: int, compute: Mapping[str, Any] | None = None
) -> Detector:
    """A detector of shapes without values, to be filled."""
    return nnx.eval_shape(lambda: build_detector(model_config, num_classes, compute=compute, rngs=nnx.Rngs(0)))


def _placed(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _on_first_device(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
