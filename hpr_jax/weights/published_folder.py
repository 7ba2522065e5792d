"""Folders and files in which detectors are published, written and read.

A folder has `model.safetensors`, `config.json` and `README.md`, as repositories of the Hugging Face hub have them. A single
file has the description that else is `config.json` in its header.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpr_jax.errors import UserError
from hpr_jax.models.detector import Detector
from hpr_jax.runtime.files import whole_folder
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.find_checkpoint import BEST, ITEMS, LATEST
from hpr_jax.weights.hub import CARD, CONFIG, WEIGHTS
from hpr_jax.weights.hugging_face import MODEL_TYPE as HUGGING_FACE_MODEL
from hpr_jax.weights.model_card import model_card
from hpr_jax.weights.published import (
    DESCRIPTION_TEXT,
    Published,
    description,
    named_tensors,
    parse,
    read_meta_of,
)
from hpr_jax.weights.safetensors_file import write_safetensors
from hpr_jax.weights.weights_file import check_numbers, read_weights

# Longer descriptions are not read, in bytes. One with ten thousand classes has half a million.
MOST_DESCRIPTION = 2**24


def is_published_folder(path: Path) -> bool:
    """Whether a path is such a folder, of this project or another, and no workdir or checkpoint."""
    of_a_run = any((path / name).is_dir() for name in (*ITEMS, BEST, LATEST))
    return not of_a_run and any((path / name).is_file() for name in (CONFIG, WEIGHTS))


def write_published_folder(folder: Path, detector: Detector, meta: Meta, place: str) -> None:
    """Writes the three files. The folder appears when it is complete.

    Args:
      folder: what does not exist, or is an empty folder.
      detector, meta: what is published.
      place: what `hpr_jax.load` will take to load it, for the model card.

    Raises:
      UserError: the folder is in use or cannot be written, or the weights are no finite numbers.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another.")
    tensors, texts = named_tensors(detector)
    check_numbers(tensors, folder)
    parameters = sum(tensor.size for tensor in tensors.values() if tensor.dtype.kind == "f")
    try:
        with whole_folder(folder) as partial:
            write_safetensors(partial / WEIGHTS, tensors, texts)
            (partial / CONFIG).write_text(description(meta), encoding="utf-8")
            (partial / CARD).write_text(model_card(meta, place, parameters), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error


def write_published_file(path: Path, detector: Detector, meta: Meta) -> None:
    """Writes one file that has the description in its header. It appears when it is complete.

    Raises:
      UserError: there is such a file, or it cannot be written, or the weights are no finite numbers.
    """
    if path.exists():
        raise UserError(f"{path} exists; choose another name, or delete it.")
    tensors, texts = named_tensors(detector)
    check_numbers(tensors, path)
    write_safetensors(path, tensors, {**texts, DESCRIPTION_TEXT: description(meta)})


def read_published_folder(folder: Path) -> Published | tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """The detector in a folder; of another project's, the tensors by official name and what its description says, as
    `read_weights` returns them.

    Raises:
      UserError: there is none, it is of a project that is not known, or one of the files is missing or damaged.
    """
    content = read_config(folder)
    if content.get("model_type") == HUGGING_FACE_MODEL:
        return read_weights(folder / WEIGHTS, content)
    meta = read_meta_of(content, folder)
    tensors, texts = read_weights(folder / WEIGHTS)
    return Published(folder, meta, tensors, texts)


def read_config(folder: Path) -> dict[str, Any]:
    """What the `config.json` of a folder holds, whichever project it is of.

    Raises:
      UserError: there is none, or it is no JSON object, or too long.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"The folder {folder} has no file {CONFIG}, which would say what its weights are of.")
    try:
        with path.open("rb") as file:
            data = file.read(MOST_DESCRIPTION + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MOST_DESCRIPTION:
        raise UserError(f"{path} has more than the {MOST_DESCRIPTION} bytes that are read; it describes no detector.")
    return parse(data, str(path))


def published_in_file(path: Path, tensors: dict[str, np.ndarray], texts: Any) -> Published | None:
    """The detector of a file that has its description in its header; None if it has none.

    Args:
      path: of the file.
      tensors, texts: what `read_weights` has read of it.

    Raises:
      UserError: the description cannot be used.
    """
    text = texts.get(DESCRIPTION_TEXT)
    if not isinstance(text, str):
        return None
    return Published(path, read_meta_of(parse(text, f"The description in {path}"), path), tensors, texts)
