"""Reads a file of weights, whatever its kind: tensors by name, and what the file says of itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpr_jax.errors import UserError
from hpr_jax.weights.arrays_file import read_arrays
from hpr_jax.weights.detrex import DETREX
from hpr_jax.weights.families import as_official
from hpr_jax.weights.hugging_face import HUGGING_FACE
from hpr_jax.weights.safetensors_file import SUFFIX as SAFETENSORS
from hpr_jax.weights.safetensors_file import read_safetensors
from hpr_jax.weights.torch_file import find_tensors, read_checkpoint

# Other projects whose detectors are known.
FAMILIES = (DETREX, HUGGING_FACE)


def read_weights(
    path: Path, description: Mapping[str, Any] | None = None
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """The tensors of a `.pth`, `.npz` or `.safetensors` file, by name, and what the file says of itself. Detectors of
    the other projects that are known, `FAMILIES`, get the official names.

    Args:
      description: what stands beside the file, and takes the place of what the file says.

    Raises:
      UserError: the file is none of these, or damaged, or its tensors are no finite real numbers.
    """
    meta: Any = None
    if path.suffix == ".npz":
        tensors = read_arrays(path)
    elif path.suffix == SAFETENSORS:
        tensors, meta = read_safetensors(path)
    else:
        content = read_checkpoint(path)
        tensors, meta = find_tensors(content, str(path)), content.get("meta")
    check_numbers(tensors, path)
    if description is None:
        description = meta if isinstance(meta, Mapping) else {}
    return by_official_name(tensors, description, str(path))


def by_official_name(
    tensors: dict[str, np.ndarray], meta: Mapping[str, Any], source: str
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Brings a detector of another project to the official names; leaves all others as they are.

    Args:
      source: the name of the file, for messages.

    Raises:
      UserError: it is of a known project, and holds what none of its detectors that are known here has.
    """
    for family in FAMILIES:
        if family.mark in tensors:
            return as_official(family, tensors, meta, source)
    return tensors, meta


def check_numbers(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Checks that all tensors of a file hold finite real numbers.

    Raises:
      UserError: one does not; the message names it.
    """
    for name, tensor in tensors.items():
        try:
            finite = tensor.dtype.kind != "c" and bool(np.all(np.isfinite(tensor)))
        except TypeError:
            finite = False
        if not finite:
            what = "complex numbers" if tensor.dtype.kind == "c" else "values that are no finite numbers"
            raise UserError(f"The weight file {path} cannot be used: {name} ({tensor.dtype}) has {what}.")
