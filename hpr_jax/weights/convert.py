"""Converts weights: official files to checkpoints of this project and back, detectors to their published form and back."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.coco import read_json
from hpr_jax.data.sources.coco_entries import read_categories
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.settings import check, leaves
from hpr_jax.weights.checkpoint import Meta, load_detector
from hpr_jax.weights.checkpoint_writer import Checkpoints
from hpr_jax.weights.classes import guess_classes
from hpr_jax.weights.hub import check_place, is_hub, push
from hpr_jax.weights.official import load_official, official_buffers, to_official
from hpr_jax.weights.published_folder import write_published_file, write_published_folder
from hpr_jax.weights.recognize import CLASS_LAYER
from hpr_jax.weights.safetensors_file import SUFFIX as SAFETENSORS
from hpr_jax.weights.source import open_source
from hpr_jax.weights.torch_file import write_checkpoint
from hpr_jax.weights.weights_file import read_weights


def from_torch(config: ConfigDict, source: Path, workdir: Path, annotations: Path | None = None) -> None:
    """Writes the checkpoint `workdir/best` with the weights of an official file.

    Args:
      config: its model is the one that the weights belong to.
      source: `.pth`, `.npz` or `.safetensors` file of an official model, with any number of classes.
      workdir: a folder that does not exist or is empty.
      annotations: COCO annotation file whose categories are the classes; by default they come from the file's own meta
        data, or are COCO's 80.

    Raises:
      UserError: the file is no official checkpoint, its weights are not of the config's model, or the folder is in use.
    """
    check(config)
    _check_free(workdir)
    tensors, meta = read_weights(source)
    if CLASS_LAYER not in tensors:
        raise UserError(f"{source} is not an official detector: it has no {CLASS_LAYER}.")
    count = len(tensors[CLASS_LAYER])
    classes = read_classes(annotations) if annotations else guess_classes(meta, count)
    if len(classes.names) != count:
        raise UserError(f"{source} knows {count} classes, and {annotations} lists {len(classes.names)}.")
    detector = abstract_detector(config.model, count)
    load_official(detector, tensors)
    step = meta.get("iter")
    step = step if isinstance(step, int) and step >= 0 else 0
    Checkpoints(workdir, keep=1).save_best(step, nnx.state(detector), Meta(to_plain(config), classes, step, {}))
    print(f"{workdir}: {len(tensors)} tensors, {count} classes. python -m hpr_jax.main evaluate --workdir {workdir}")


def _check_free(workdir: Path) -> None:
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"{workdir} exists and is not an empty folder; choose another.")


def to_checkpoint(source: str | Path, workdir: Path, overrides: Sequence[tuple[str, str]] = ()) -> None:
    """Writes the checkpoint `workdir/best` of a detector that says itself what it is.

    Args:
      source: as `open_source` takes it.
      workdir: a folder that does not exist or is empty.
      overrides: settings (dotted key, text) in place of the detector's.

    Raises:
      UserError: there is no detector, or the folder is in use.
    """
    _check_free(workdir)
    found = open_source(source, overrides)
    meta = Meta(to_plain(found.config), found.classes, found.step, found.metrics)
    Checkpoints(workdir, keep=1).save_best(found.step, nnx.state(found.build(None)), meta)
    print(f"{workdir}: {len(found.classes.names)} classes. python -m hpr_jax.main evaluate --workdir {workdir}")


def publish(
    source: str | Path, target: str | Path, overrides: Sequence[tuple[str, str]] = (), config: ConfigDict | None = None
) -> None:
    """Writes a detector in the form in which detectors are published.

    Args:
      source: as `open_source` takes it.
      target: a `.safetensors` file, a folder, or `hf://owner/name`, a repository of the Hugging Face hub. None of them may
        hold anything yet.
      overrides: settings (dotted key, text) in place of the detector's.
      config: in place of the detector's; its model must be the same.

    Raises:
      UserError: there is no detector, or it cannot be written there.
    """
    if is_hub(target):
        check_place(str(target))
    found = open_source(source, overrides, config)
    detector = found.build(None)
    meta = Meta(to_plain(found.config), found.classes, found.step, found.metrics)
    if is_hub(target):
        with tempfile.TemporaryDirectory() as folder:
            write_published_folder(Path(folder), detector, meta, str(target))
            push(Path(folder), str(target))
    elif Path(target).suffix == SAFETENSORS:
        write_published_file(Path(target), detector, meta)
    else:
        write_published_folder(Path(target), detector, meta, Path(target).name)
    print(f"{target}: {len(meta.classes.names)} classes. It is loaded by hpr_jax.load({str(target)!r}).")
    for key, path in _machine_paths(found.config):
        print(f"It names {path}, a place on this machine; --config.{key}=PLACE publishes another.")


def _machine_paths(config: ConfigDict) -> list[tuple[str, str]]:
    """The settings of a config that are places on the machine where it was used, with their keys."""
    return [(key, value) for key, value in leaves(config) if isinstance(value, str) and Path(value).is_absolute()]


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


def read_classes(annotations: Path) -> Classes:
    """The categories of a COCO annotation file, in the file's order, which is the official code's order of classes."""
    if not annotations.is_file():
        raise UserError(f"The annotation file {annotations} does not exist.")
    return read_categories(read_json(annotations, ["categories"])["categories"], str(annotations))
