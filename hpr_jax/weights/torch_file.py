"""PyTorch checkpoint files (`.pth`), read and written without PyTorch.

Such a file has a pickle, and the raw bytes of its tensors. `restricted_pickle` reads the pickle, so that no file runs code.
"""

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpr_jax.errors import UserError
from hpr_jax.runtime.files import whole_file
from hpr_jax.weights.restricted_pickle import DTYPES, STORAGES, Unreadable, unpickle

_ZIP_START = b"PK\x03\x04"
# Size in bytes of the fixed part of the header in front of each zip entry.
_ZIP_HEADER_SIZE = 30
# Numbers at the start of files of the older format.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Keys under which checkpoints hold the state dict, in the order in which they are tried.
_CONTAINERS = ("state_dict", "model", "model_state", "network")
# Matches keys of state dicts whose values are no tensors, and are left out.
_BOOKKEEPING = re.compile(r"(^|\.)_(metadata|extra_state)$")


def read_checkpoint(path: Path) -> Any:
    """Reads a checkpoint file, in the zip format (PyTorch 1.6 and later) or the one before it.

    Tensors become C-contiguous NumPy arrays in host memory; those that share a storage share memory here too, unless
    they are strided views. Objects of training frameworks become empty placeholders.

    Raises:
      UserError: no such file, no checkpoint, a damaged one, or one that would run code when loaded.
    """
    if not path.is_file():
        raise UserError(f"The checkpoint {path} " + ("is no file." if path.exists() else "does not exist."))
    try:
        with path.open("rb") as file:
            start = file.read(len(_ZIP_START))
        return _read_zip(path) if start == _ZIP_START else _read_legacy(path)
    # A damaged pickle can raise any error.
    except Exception as error:
        explained = isinstance(error, Unreadable | PermissionError)
        why = str(error) if explained else "it is damaged, cut short, or no PyTorch checkpoint; copy or download it again"
        raise UserError(f"The checkpoint {path} cannot be read: {_one_line(why)}.") from error


def _one_line(text: str) -> str:
    """Text of a file or an error, fit for an error message: printable and of limited length."""
    return "".join(c if c.isprintable() else " " for c in text)[:300].rstrip(" .")


def _read_zip(path: Path) -> Any:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = archive.namelist()
        root = next((name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
        if root is None:
            raise Unreadable("it is a zip file without data.pkl, so no PyTorch checkpoint")
        # PyTorch compresses nothing. Entries that do, or that overlap, could unfold into more than the file holds.
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
            raise Unreadable("it has compressed entries, which PyTorch does not write")
        if sum(entry.file_size for entry in entries) > size:
            raise Unreadable("its entries are larger than the file")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() != b"little":
            raise Unreadable("its numbers are not little-endian; save it again on a common machine")

        def load_storage(key, dtype, count):
            data = archive.read(f"{root}data/{key}")
            if len(data) < count * dtype.itemsize:
                raise Unreadable(f"its storage {key} has {len(data)} bytes, too few for {count} of {dtype}")
            # The copy is writable, and aligned.
            return np.frombuffer(data, np.uint8)[: count * dtype.itemsize].copy().view(dtype)

        return unpickle(io.BytesIO(archive.read(f"{root}data.pkl")), load_storage, size)


def _read_legacy(path: Path) -> Any:
    # Read into memory as a whole, so that a false length cannot ask for more than the file holds.
    file = io.BytesIO(path.read_bytes())
    size = file.getbuffer().nbytes
    if unpickle(file) != _LEGACY_MAGIC:
        raise Unreadable("it is a pickle, but no PyTorch checkpoint")
    if unpickle(file) != _LEGACY_PROTOCOL or unpickle(file).get("little_endian") is not True:
        raise Unreadable("it is of another format version, or its numbers are not little-endian")
    storages: dict[str, np.ndarray] = {}
    left = size

    def allocate(key, dtype, count):
        nonlocal left
        left -= count * dtype.itemsize
        if left < 0:
            raise Unreadable(f"its storage {key} should have {count} numbers, more than the file holds")
        storages[key] = np.zeros(count, dtype)
        return storages[key]

    # The storages are behind the pickle, but only the pickle tells their types. So it is read twice: first for the types,
    # and for the tensors once the storages are filled.
    start = file.tell()
    unpickle(file, allocate, size)
    keys = unpickle(file)
    if sorted(keys) != sorted(storages):
        raise Unreadable("its list of storages does not fit its tensors")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages[key].size or file.readinto(storages[key].view(np.uint8).data) != storages[key].nbytes:
            raise Unreadable(f"its storage {key} is cut short or of another length than its tensors say")
    file.seek(start)
    return unpickle(file, lambda key, dtype, count: storages[key], size)


def find_tensors(content: Any, source: str) -> dict[str, np.ndarray]:
    """Finds the state dict in a checkpoint's content: under one of the usual keys, or the content itself.

    A prefix `module.` that all names have (from DataParallel) is taken off.

    Args:
      source: the name of the file, for messages.

    Returns:
      C-contiguous arrays by name.

    Raises:
      UserError: there is no state dict, or it holds things that are no arrays.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"The checkpoint {source} holds no state dict but an object of type {type(content).__name__}.")
    inner = (content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping))
    found = next(inner, content)
    arrays = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    strange = [k for k in found if k not in arrays and not (isinstance(k, str) and _BOOKKEEPING.search(k))]
    if not arrays:
        keys = f"its keys are {_listed(content)}" if content else "it is empty"
        raise UserError(f"The checkpoint {source} holds no tensors where they are looked for; {keys}.")
    if strange:
        raise UserError(f"The state dict of the checkpoint {source} holds things that are no tensors: {_listed(strange)}.")
    prefix = "module." if all(name.startswith("module.") for name in arrays) else ""
    return {name.removeprefix(prefix): np.asarray(value, order="C") for name, value in arrays.items()}


def _listed(keys: Any) -> str:
    """Keys of a file, fit for an error message: the first ones, and how many more there are."""
    names = [_one_line(key) if isinstance(key, str) else f"a {type(key).__name__}" for key in keys]
    return (", ".join(names[:20]) or "none") + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def write_checkpoint(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes `{"state_dict": tensors, "meta": meta}` as a file for `torch.load`, in place of an earlier one.

    The file appears under its name when it is complete.

    Args:
      tensors: by name, of types that have a PyTorch storage class.
      meta: None, booleans, numbers and text, in dicts, lists and tuples.

    Raises:
      UserError: a value is of a type that is not written, or the file cannot be written.
    """
    if not _is_plain(dict(meta)):
        raise UserError("The meta values of a checkpoint must be plain: numbers, text, and dicts, lists and tuples of them.")
    # Not ascontiguousarray: it gives scalars an axis.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    arrays = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in arrays.items()}
    content = b"".join(_pickled(arrays, dict(meta)))
    try:
        _write_zip(path, content, list(arrays.values()))
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be written: {error.strerror}.") from error


def _write_zip(path: Path, content: bytes, storages: Sequence[np.ndarray]) -> None:
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", content)
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(storages):
            _add(archive, f"data/{key}", array.reshape(-1).view(np.uint8).data)
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds an entry to the archive, laid out as PyTorch does."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = len(data)
    assert archive.fp is not None, "the archive is open"
    # PyTorch pads the header, so that the data start at a multiple of 64 bytes (in entries below 2 GiB).
    padding = -(archive.fp.tell() + _ZIP_HEADER_SIZE + len(info.filename) + 4) % 64
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w") as entry:
        entry.write(data)


def _is_plain(value: Any) -> bool:
    """Whether a value is None, a boolean, a number or text, or dicts, lists and tuples of such."""
    if type(value) is dict:
        return all(type(key) in (str, int) and _is_plain(inner) for key, inner in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _pickled(arrays: Mapping[str, np.ndarray], meta: dict[str, Any]) -> Iterator[bytes]:
    """The opcodes of the pickle. They are written by hand, since `pickle` would have to import PyTorch's functions.

    Raises:
      UserError: an array is of a type without PyTorch storage class.
    """
    classes = {DTYPES[dtype]: name for name, dtype in STORAGES.items()}
    ordered_dict = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    yield pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK
    yield _fragment("state_dict") + ordered_dict + pickle.MARK
    for key, (name, array) in enumerate(arrays.items()):
        if array.dtype not in classes:
            raise UserError(f"{name} is of type {array.dtype}, which PyTorch checkpoints of this writer do not hold.")
        strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        yield _fragment(name) + pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK
        yield pickle.MARK + _fragment("storage") + pickle.GLOBAL + f"torch\n{classes[array.dtype]}\n".encode()
        yield _fragment(str(key)) + _fragment("cpu") + _fragment(array.size) + pickle.TUPLE + pickle.BINPERSID
        # Storage offset, shape, strides, requires_grad, backward hooks.
        yield _fragment(0) + _fragment(array.shape) + _fragment(strides) + pickle.NEWFALSE + ordered_dict
        yield pickle.TUPLE + pickle.REDUCE
    yield pickle.SETITEMS + _fragment("meta") + _fragment(meta) + pickle.SETITEMS + pickle.STOP


def _fragment(value: Any) -> bytes:
    """The opcodes of a plain value, without the head and end of a pickle."""
    return pickle.dumps(value, protocol=2)[2:-1]
