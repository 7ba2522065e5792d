"""NumPy's `.npz` files of arrays, read with bounded memory, and without running anything that is in them."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hpr_jax.errors import UserError

# The arrays of a file may have so many bytes for each of the file's, and this many more. Compressed weights have less than
# twice as many; a file that claims more asks for memory that it does not fill.
MOST_TIMES, MOST_MORE = 100, 2**26


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, by name.

    Raises:
      UserError: there is no such file, or it is damaged, encrypted, of other content, or claims more than it can hold.
    """
    if not path.is_file():
        raise UserError(f"The weight file {path} " + ("is no file." if path.exists() else "does not exist."))
    try:
        with zipfile.ZipFile(path) as archive:
            _check_claims(archive, path.stat().st_size)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except _RefusedError as error:
        raise UserError(f"The weight file {path} cannot be read: {error}.") from error
    # A damaged archive can raise any error.
    except Exception as error:
        what = "is damaged, cut short, or not an .npz file of arrays; copy or download it again"
        raise UserError(f"The weight file {path} {what}.") from error


class _RefusedError(Exception):
    """The file is not read. The message says why, and completes a sentence."""


def _check_claims(archive: zipfile.ZipFile, size: int) -> None:
    """Checks, by the headers alone, that the arrays can be in a file of `size` bytes."""
    left = MOST_TIMES * size + MOST_MORE
    for entry in archive.infolist():
        if entry.flag_bits & 1:
            raise _RefusedError(f"{entry.filename} is encrypted")
        left -= entry.file_size
        if left < 0:
            raise _RefusedError(f"its arrays claim more than {MOST_TIMES} times the size of the file")
        with archive.open(entry) as content:
            shape, dtype = _header(content)
        if dtype.hasobject:
            raise _RefusedError(f"{entry.filename} holds Python objects, which would run code when loaded")
        if math.prod(shape) * dtype.itemsize > entry.file_size:
            raise _RefusedError(f"{entry.filename} claims to have the shape {shape}, for which the file is too small")


def _header(content: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in NumPy's format."""
    version = np.lib.format.read_magic(content)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(content)
    return shape, dtype
