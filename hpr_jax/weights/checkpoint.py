"""The format of checkpoints, and how they are read.

A checkpoint is a directory in Orbax's format with a manifest of its files. Its items are `model` (all variables that
evaluation takes), `training` (what else a run needs to go on; the best checkpoint of a run lacks it) and `meta` (JSON:
config, classes, step, metrics, what the run depends on).
"""

import contextlib
import dataclasses
import json
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
from hpr_jax.runtime.devices import require_devices
from hpr_jax.settings import AUTO, check, require_refiners
from hpr_jax.weights.find_checkpoint import ITEMS, find_checkpoint
from hpr_jax.weights.manifest import NAME as MANIFEST
from hpr_jax.weights.manifest import find_damage

# Settings that did not exist yet when the first checkpoints were written, with the values for what was done then.
_ADDED_SETTINGS: dict[str, dict[str, Any]] = {
    "train": {
        "accumulation_steps": 1,
        "ema_decay": 0.0,
        "matching": "auto",
        "best_metric": "AP",
        "patience": 0,
        "min_gain": 0.0,
        "plots": False,
        "wandb": "",
    },
    "data": {
        "workers": 0,
        "train_split": "train",
        "val_split": "validation",
        "val_fraction": 0.2,
        "repeat_threshold": 0.0,
        "image_bits": 16,
        "patience": 600.0,
    },
    "optimizer": {
        "recipe_batch_size": 16,
        "merge_multiplier": 1.0,
        "merge_decay": True,
        "offsets_multiplier": 1.0,
        "schedule": "milestones",
    },
    "loss": {"class_weight": 1.0},
    "compute": {"precision": "default"},
    "evaluate": {"max_detections": [1, 10, 100]},
}

_ADDED_REFINER_SETTINGS = {
    "final_norm": True,
    "look_forward_twice": True,
    "refine_epsilon": 1e-3,
    "output_epsilon": 1e-5,
}

# The file in which Orbax keeps the item `meta`.
META_FILE = "meta/metadata"

log = logging.getLogger("hpr_jax")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    Attributes:
      config: the run's config as plain dicts.
      classes: of the data set that the run trains on.
      step: number of training steps made.
      metrics: of the evaluation at this step, if there was one.
      run: JSON values that a run which goes on from the checkpoint must know beside the arrays.
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
        """The inverse of `to_json`; raises as `require_refiners` does."""
        classes = Classes(tuple(content["class_names"]), tuple(content["category_ids"]))
        require_refiners(content["config"]["model"])
        return Meta(_upgraded(content["config"]), classes, content["step"], content["metrics"], content.get("run", {}))


def _upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config with today's settings. The first configs had no section `compute` but `remat` in the model, and
    training knew weak views alone."""
    config = {section: {**_ADDED_SETTINGS.get(section, {}), **values} for section, values in config.items()}
    backbone = config["model"]["backbone"]
    first_map = {"first_map": 1 if backbone["kind"] == "resnet" else 0}
    refiner = {**_ADDED_REFINER_SETTINGS, **config["model"]["refiner"]}
    config["model"] = {"frozen_parts": [], **config["model"], "backbone": {**first_map, **backbone}, "refiner": refiner}
    if "compute" in config:
        return config
    model = {key: value for key, value in config["model"].items() if key != "remat"}
    model["backbone"] = {key: value for key, value in model["backbone"].items() if key != "remat"}
    lsj = {"side": 1024, "scale_range": [0.1, 2.0], "copy_paste": True}
    augmentation = {"lsj": lsj, "drop_vanished": False, **config["augmentation"], "strong_views": False}
    compute = {**dataclasses.asdict(Compute()), "remat": list(Compute().remat)}
    return {**config, "model": model, "compute": compute, "augmentation": augmentation}


def read_meta(path: Path, *, verify: bool = True) -> Meta:
    """What a checkpoint says of itself.

    Args:
      path: as `find_checkpoint` takes it.
      verify: compares all files of the checkpoint with its manifest first.

    Raises:
      UserError: there is no checkpoint, or it is damaged or cannot be read.
    """
    path = find_checkpoint(Path(path)).resolve()
    damage = checkpoint_damage(path) if verify else None
    if damage:
        raise UserError(f"The checkpoint {path} is damaged: {damage}.")
    with open_reader(path) as reader:
        return Meta.from_json(reader.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)


def checkpoint_damage(path: Path) -> str | None:
    """What is damaged of a checkpoint or missing, as a clause that completes "it is damaged: "; None if nothing is.

    Checkpoints without a manifest are as old as manifests are, or have lost it: the first ones said nothing about their run.
    """
    if (path / MANIFEST).exists():
        return find_damage(path) or next((f"{item} is missing" for item in ITEMS if not (path / item).is_dir()), None)
    try:
        content = json.loads((path / META_FILE).read_bytes())
    except FileNotFoundError:
        return f"{META_FILE} is missing"
    except (OSError, ValueError, RecursionError):
        return f"{META_FILE} cannot be read"
    return f"{MANIFEST} is missing" if not isinstance(content, dict) or "run" in content else None


def load_detector(path: Path, compute: Mapping[str, Any] | None = None) -> tuple[Detector, Meta]:
    """The detector of a checkpoint, and what the checkpoint says of itself; raises as `read_meta` does.

    Args:
      path: as `find_checkpoint` takes it.
      compute: how the detector shall compute (see `hpr_jax.models.build.Compute`), instead of how it did in training; None
        takes the defaults.
    """
    path = find_checkpoint(Path(path)).resolve()
    meta = read_meta(path)
    with open_reader(path) as reader:
        detector = abstract_detector(from_plain(meta.config).model, len(meta.classes.names), compute)
        state = nnx.state(detector)
        restored = reader.restore(
            path, args=ocp.args.Composite(model=ocp.args.StandardRestore(_on_first_device(nnx.to_pure_dict(state))))
        )
    nnx.replace_by_pure_dict(state, restored.model)
    nnx.update(detector, state)
    return detector, meta


@contextlib.contextmanager
def open_reader(path: Path) -> Iterator[ocp.Checkpointer]:
    """A context in which the checkpoint at `path` is read, by the reader that it gives.

    Raises:
      UserError: in place of whatever Orbax raises in the context, or JAX has no device to read to.
    """
    require_devices()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            yield reader
    except UserError:
        raise
    except Exception as error:
        # Orbax raises errors of any type, bare exceptions among them, over many lines in its own words.
        log.debug("Orbax on %s", path, exc_info=error)
        why = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        raise UserError(
            f"The checkpoint {path} cannot be read: it is damaged, or was written by another version of this project{why}."
        ) from error


def checkpoint_config(meta: Meta, overrides: Iterable[tuple[str, str]], config: ConfigDict | None = None) -> ConfigDict:
    """The config of a checkpoint with overrides.

    Args:
      meta: of the checkpoint.
      overrides: (dotted key, text of the value).
      config: taken in place of the checkpoint's config; its model must be the same.

    Raises:
      UserError: the model is another than the checkpoint's, or an override is wrong.
    """
    config = from_plain(meta.config) if config is None else config
    for key, text in overrides:
        override(config, key, text)
    if config.train.batch_size == AUTO:
        # The run has chosen.
        with config.train.ignore_type():
            config.train.batch_size = meta.config["train"]["batch_size"]
    different = differences(meta.config["model"], to_plain(config)["model"], "config.model.")
    if different:
        raise UserError(f"The checkpoint is of another model: {', '.join(different)}.")
    check(config)
    return config


def _on_first_device(tree: Any) -> Any:
    """A tree of abstract arrays, restored to the first device, whichever devices the checkpoint was written from."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
