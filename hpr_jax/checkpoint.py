"""Orbax checkpoints: the latest ones of a run, and its best one apart from them.

A checkpoint is a directory with the items `model` (all variables), `training` (optimizer state; not in best ones) and
`meta` (JSON: config, classes, step, metrics). `model` and `meta` suffice for evaluation and prediction.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.config import check, differences, from_plain, override, to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import Compute, build_detector
from hpr_jax.models.detector import Detector

LATEST, BEST = "checkpoints", "best"


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself."""

    config: dict[str, Any]
    classes: Classes
    step: int
    metrics: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "class_names": list(self.classes.names),
            "category_ids": list(self.classes.category_ids),
            "step": self.step,
            "metrics": self.metrics,
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Meta":
        classes = Classes(tuple(content["class_names"]), tuple(content["category_ids"]))
        return Meta(_current(content["config"]), classes, content["step"], content["metrics"])


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config as configs are now: once, splits had no names; before, how to compute was part of the model, and
    views were weak alone."""
    config = {**config, "data": {"train_split": "train", "val_split": "validation", **config["data"]}}
    if "compute" in config:
        return config
    model = {key: value for key, value in config["model"].items() if key != "remat"}
    model["backbone"] = {key: value for key, value in model["backbone"].items() if key != "remat"}
    lsj = {"side": 1024, "scale_range": [0.1, 2.0], "copy_paste": True}
    augmentation = {"lsj": lsj, "drop_vanished": False, **config["augmentation"], "strong_views": False}
    compute = {**dataclasses.asdict(Compute()), "remat": list(Compute().remat)}
    return {**config, "model": model, "compute": compute, "augmentation": augmentation}


class Checkpoints:
    """The checkpoints of one run, below its workdir."""

    def __init__(self, workdir: Path, keep: int):
        def manager(name, keep):
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
            return ocp.CheckpointManager((workdir / name).resolve(), options=options)

        self._latest, self._best = manager(LATEST, keep), manager(BEST, 1)

    def save(self, step: int, model: nnx.State, training: Any, meta: Meta) -> None:
        """Saves a checkpoint to resume from."""
        self._save(self._latest, step, meta, model=nnx.to_pure_dict(model), training=training)

    def save_best(self, step: int, model: nnx.State, meta: Meta) -> None:
        """Saves the best model so far, in place of the one before."""
        for later in [other for other in self._best.all_steps() if other >= step]:
            # From a run that went back before it; Orbax would keep it and leave the new one out.
            self._best.delete(later)
        self._save(self._best, step, meta, model=nnx.to_pure_dict(model))

    @staticmethod
    def _save(manager: ocp.CheckpointManager, step: int, meta: Meta, **items: Any) -> None:
        arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta.to_json()), **arrays))
        # At once, so that nothing depends on when the state's buffers, donated to the next step, are read.
        manager.wait_until_finished()

    def latest_meta(self) -> Meta | None:
        """What the newest checkpoint says of itself, or None before the first."""
        return self._meta(self._latest)

    def best_meta(self) -> Meta | None:
        """The same of the best checkpoint."""
        return self._meta(self._best)

    @staticmethod
    def _meta(manager: ocp.CheckpointManager) -> Meta | None:
        step = manager.latest_step()
        if step is None:
            return None
        return Meta.from_json(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)

    def restore(self, step: int, model: nnx.State, training: Any) -> tuple[nnx.State, Any]:
        """The model and training state of a step, in the shapes of the given ones."""
        restored = self._latest.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(_abstract(nnx.to_pure_dict(model))),
                training=ocp.args.StandardRestore(_abstract(training)),
            ),
        )
        nnx.replace_by_pure_dict(model, restored.model)
        return model, restored.training

    def close(self) -> None:
        self._latest.close()
        self._best.close()


def find_checkpoint(path: Path) -> Path:
    """A checkpoint directory, the newest below a directory of checkpoints, or the best (else newest) of a workdir.

    Raises:
      UserError: there is none.
    """
    if (path / "model").is_dir() and (path / "meta").is_dir():
        return path
    for folder in (path / BEST, path / LATEST, path):
        steps = [p for p in folder.glob("*") if p.name.isdigit() and (p / "meta").is_dir()] if folder.is_dir() else []
        if steps:
            return max(steps, key=lambda p: int(p.name))
    raise UserError(f"There is no checkpoint in {path}; give a run's workdir or one checkpoint's directory.")


def read_meta(path: Path) -> Meta:
    """What a checkpoint says of itself.

    Raises:
      UserError: no checkpoint there, or one that cannot be read.
    """
    path = find_checkpoint(Path(path)).resolve()
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
            path, args=ocp.args.Composite(model=ocp.args.StandardRestore(_abstract(nnx.to_pure_dict(state))))
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


def _abstract(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
