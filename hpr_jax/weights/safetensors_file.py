"""Files of tensors in the safetensors format, read with bounded memory, and written whole.

Such a file is the length of its header in 8 bytes, a JSON header, and the raw bytes of the tensors. Nothing in it can run.
"""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from hpr_jax.errors import UserError, shown
from hpr_jax.runtime.files import whole_file

SUFFIX = ".safetensors"
# Size in bytes of the number in front of the header: its length.
_LENGTH_SIZE = 8
# The longest header that is read, in bytes. A header has some hundred bytes for each tensor, and those of detectors a
# thousand tensors.
MOST_HEADER = 2**24
# The types that are read and written, by the format's names. Complex numbers are left to `check_numbers` to refuse.
_DTYPES = {
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(bool),
    "C64": np.dtype(np.complex64),
}


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file by name, and the texts that its header has beside them.

    Raises:
      UserError: there is no such file, or it is damaged, of other content, or has tensors of a type that is not read here.
    """
    if not path.is_file():
        raise UserError(f"The weight file {path} " + ("is no file." if path.exists() else "does not exist."))
    try:
        _check_length(path)
        return _read(path)
    except _RefusedError as error:
        raise UserError(f"The weight file {path} cannot be read: {error}.") from error
    # The library raises errors of its own, those of the system, and those of NumPy.
    except Exception as error:
        what = "is damaged, cut short, or not in the safetensors format; copy or download it again"
        raise UserError(f"The weight file {path} {what}.") from error


class _RefusedError(Exception):
    """The file is not read. The message says why, and completes a sentence."""


def _check_length(path: Path) -> None:
    """Checks the length of the header before anybody makes room for it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_SIZE), "little")
    if size < _LENGTH_SIZE:
        raise _RefusedError(f"it has {size} bytes, fewer than any such file; copy or download it again")
    if length > size - _LENGTH_SIZE:
        raise _RefusedError(f"its header claims {length} bytes, and the file has {size}; copy or download it again")
    if length > MOST_HEADER:
        raise _RefusedError(f"its header has {length} bytes, more than the {MOST_HEADER} that are read")


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    # The library is wanted by few commands, so these alone import it.
    from safetensors import safe_open

    tensors = {}
    # Read and not mapped: where a mapped file is cut while it is read, the system ends the process.
    with safe_open(path, framework="np", backend="pread") as file:
        for name in list(file.keys()):
            kind = file.get_slice(name).get_dtype()
            if kind not in _DTYPES:
                raise _RefusedError(f"{shown(name)} is of the type {kind}; convert it to one of {', '.join(_DTYPES)}")
            tensors[name] = file.get_tensor(name).astype(_DTYPES[kind], copy=False)
        return tensors, dict(file.metadata() or {})


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
    """Writes tensors by name, and texts beside them, in place of an earlier file.

    The file appears under its name when it is complete.

    Raises:
      UserError: a tensor is of a type that is not written, or the file cannot be written.
    """
    from safetensors.numpy import save

    # The library writes the memory behind an array as it lies.
    arrays = {name: np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C") for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in _DTYPES.values():
            raise UserError(f"{name} is of type {array.dtype}; safetensors files are written of {', '.join(_DTYPES)}.")
    try:
        with whole_file(path) as partial:
            # The library's own files are readable by their owner alone.
            partial.write_bytes(save(arrays, dict(texts)))
    except OSError as error:
        raise UserError(f"The weight file {path} cannot be written: {error.strerror}.") from error
