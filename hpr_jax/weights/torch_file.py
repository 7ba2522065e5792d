"""PyTorch checkpoint files (`.pth`), read and written without PyTorch.

Such a file is a pickle beside the raw bytes of its tensors. `restricted_pickle` reads the pickle, so that no file runs code.
"""

import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpr_jax.errors import UserError
from hpr_jax.weights.restricted_pickle import DTYPES, STORAGES, Unreadable, unpickle

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_CONTAINERS = ("state_dict", "model", "model_state", "network")
_BOOKKEEPING = re.compile(r"(^|\.)_(metadata|extra_state)$")


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint file, in the zip format (PyTorch 1.6 and later) or the one before it.

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
        clear = isinstance(error, Unreadable | PermissionError)
        why = str(error) if clear else f"it is damaged or no PyTorch checkpoint ({type(error).__name__}: {error})"
        raise UserError(f"The checkpoint {path} cannot be read: {_one_line(why)}.") from error


def _one_line(text: str) -> str:
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
    # In memory, a false length can ask for no more than there is.
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

    # The storages come last, but only the pickle tells their types: it is read before them for the types, and again
    # after them for the tensors.
    start = file.tell()
    unpickle(file, allocate, size)
    keys = unpickle(file)
    if sorted(keys) != sorted(storages):
        raise Unreadable("its list of storages does not fit its tensors")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages[key].size or file.readinto(storages[key].view(np.uint8)) != storages[key].nbytes:
            raise Unreadable(f"its storage {key} is cut short or of another length than its tensors say")
    file.seek(start)
    return unpickle(file, lambda key, dtype, count: storages[key], size)


def find_tensors(content: Any) -> dict[str, np.ndarray]:
    """The state dict of a checkpoint's content: within a container of the usual names, or the content itself.

    A prefix `module.` that all names have (from DataParallel) is taken off.

    Raises:
      UserError: there is no state dict, or it holds things that are no arrays.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"The checkpoint holds no state dict but an object of type {type(content).__name__}.")
    inner = (content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping))
    found = next(inner, content)
    arrays = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    strange = [k for k in found if k not in arrays and not (isinstance(k, str) and _BOOKKEEPING.search(k))]
    if not arrays:
        raise UserError(f"The checkpoint holds no tensors where they are looked for; its keys are {_listed(content)}.")
    if strange:
        raise UserError(f"The checkpoint's state dict holds things that are no tensors: {_listed(strange)}.")
    prefix = "module." if all(name.startswith("module.") for name in arrays) else ""
    return {name.removeprefix(prefix): np.asarray(value, order="C") for name, value in arrays.items()}


def _listed(keys: Any) -> str:
    names = [_one_line(key) if isinstance(key, str) else f"a {type(key).__name__}" for key in keys]
    return (", ".join(names[:20]) or "none") + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def write_checkpoint(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes `{"state_dict": tensors, "meta": meta}` for `torch.load`; a file that is there already is replaced.

    The file appears once it is whole.

    Args:
      tensors: arrays of the types that have a PyTorch storage class.
      meta: None, booleans, numbers and text, in dicts, lists and tuples.

    Raises:
      UserError: a type that is not written, or no place to write to.
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
        raise UserError(f"The checkpoint {path} cannot be written: {error}.") from error


def _write_zip(path: Path, content: bytes, storages: Sequence[np.ndarray]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, "data.pkl", content)
            _add(archive, "byteorder", b"little")
            for key, array in enumerate(storages):
                _add(archive, f"data/{key}", array.reshape(-1).view(np.uint8).data)
            _add(archive, "version", b"3\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = len(data)
    # PyTorch's own padding, by which the data start at multiples of 64 bytes (in entries below 2 GiB).
    padding = -(archive.fp.tell() + zipfile.sizeFileHeader + len(info.filename) + 4) % 64
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w") as entry:
        entry.write(data)


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) in (str, int) and _is_plain(inner) for key, inner in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _pickled(arrays: Mapping[str, np.ndarray], meta: dict) -> Iterator[bytes]:
    """The opcodes of the pickle. They are put together here since `pickle` itself would import PyTorch's functions."""
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
    """The opcodes of a plain value, without the pickle's head and end."""
    return pickle.dumps(value, protocol=2)[2:-1]
