"""Orbax checkpoints: the latest ones of a run, and its best one apart from them.

A checkpoint is a directory with the items `model` (all variables that evaluation takes), `training` (what else a run goes on
from; not in best ones) and `meta` (JSON: config, classes, step, metrics, what the run depends on), and a manifest.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.config import differences, from_plain, override, to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import Compute, abstract_detector
from hpr_jax.models.detector import Detector
from hpr_jax.settings import check
from hpr_jax.weights.manifest import find_damage

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


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("*") if path.name.isdigit() and (path / "meta").is_dir()]
    return sorted(found, key=lambda path: int(path.name))


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


def _on_first_device(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
