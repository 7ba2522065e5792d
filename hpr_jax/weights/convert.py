"""Converts official PyTorch checkpoints to checkpoints of this project, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.coco import COCO_CLASSES, read_categories, read_json
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.settings import check
from hpr_jax.weights.checkpoint import Meta, load_detector
from hpr_jax.weights.checkpoint_writer import Checkpoints
from hpr_jax.weights.initial import check_numbers
from hpr_jax.weights.official import load_official, official_buffers, to_official
from hpr_jax.weights.torch_file import find_tensors, read_checkpoint, write_checkpoint

# The official layer whose rows are the classes.
_CLASS_LAYER = "bbox_head.cls_branches.0.weight"


def from_torch(config: ConfigDict, source: Path, workdir: Path, annotations: Path | None = None) -> None:
    """Writes the checkpoint `workdir/best` with the weights of an official file.

    Args:
      config: its model is the one that the weights belong to.
      source: `.pth` file of an official model, with any number of classes.
      workdir: a folder that does not exist or is empty.
      annotations: COCO annotation file whose categories are the classes; by default they come from the file's own meta
        data, or are COCO's 80.

    Raises:
      UserError: the file is no official checkpoint, its weights are not of the config's model, or the folder is in use.
    """
    check(config)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"{workdir} exists and is not an empty folder; choose another.")
    content = read_checkpoint(source)
    tensors = find_tensors(content, str(source))
    check_numbers(tensors, source)
    if _CLASS_LAYER not in tensors:
        raise UserError(f"{source} is not an official detector: it has no {_CLASS_LAYER}.")
    count = len(tensors[_CLASS_LAYER])
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    classes = read_classes(annotations) if annotations else guess_classes(meta, count)
    if len(classes.names) != count:
        raise UserError(f"{source} knows {count} classes, and {annotations} lists {len(classes.names)}.")
    detector = abstract_detector(config.model, count)
    load_official(detector, tensors)
    step = meta.get("iter")
    step = step if isinstance(step, int) and step >= 0 else 0
    Checkpoints(workdir, keep=1).save_best(step, nnx.state(detector), Meta(to_plain(config), classes, step, {}))
    print(f"{workdir}: {len(tensors)} tensors, {count} classes. python -m hpr_jax.main evaluate --workdir {workdir}")


def to_torch(source: Path, target: Path) -> None:
    """Writes a checkpoint as a `.pth` file that the official code loads strictly.

    Args:
      source: a checkpoint's directory or a run's workdir.
      target: the file.

    Raises:
      UserError: there is no checkpoint, or its detector has refiners that the official code lacks.
    """
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file.")
    detector, meta = load_detector(source)
    tensors = to_official(detector)
    tensors |= official_buffers(tensors)
    dataset = {"classes": list(meta.classes.names), "category_ids": list(meta.classes.category_ids)}
    write_checkpoint(target, tensors, {"dataset_meta": dataset, "iter": meta.step})
    print(f"{target}: {len(tensors)} tensors, {len(meta.classes.names)} classes.")


def guess_classes(meta: Mapping[str, Any], count: int) -> Classes:
    """The `count` classes that a file names in its meta data; if it names none, COCO's if there are 80, else numbers."""
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    names = dataset.get("classes", dataset.get("CLASSES"))
    if not isinstance(names, list | tuple) or len(names) != count:
        names = COCO_CLASSES.names if count == len(COCO_CLASSES.names) else [f"class {i}" for i in range(count)]
    names = tuple(map(str, names))
    if names == COCO_CLASSES.names:
        return COCO_CLASSES
    ids = dataset.get("category_ids")
    if not isinstance(ids, list | tuple) or len(ids) != count or not all(isinstance(one, int | str) for one in ids):
        ids = range(1, count + 1)
    return Classes(names, tuple(ids))


def read_classes(annotations: Path) -> Classes:
    """The categories of a COCO annotation file, in the file's order, which is the official code's order of classes."""
    if not annotations.is_file():
        raise UserError(f"The annotation file {annotations} does not exist.")
    return read_categories(read_json(annotations, ["categories"])["categories"], str(annotations))
