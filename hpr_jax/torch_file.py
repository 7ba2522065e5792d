"""PyTorch checkpoint files (`.pth`), read and written without PyTorch.

Such a file is a pickle beside the raw bytes of its tensors, and a pickle may name any Python function and have it run.
The reader here hands out stand-ins for a fixed list of names and refuses every other name, so that no file runs code.
"""

import collections
import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hpr_jax.errors import UserError

_STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"}
_STORAGES |= {"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16"}
_STORAGES |= {"CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}
_STORAGES |= {"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"}
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in _STORAGES.values()}

# Classes whose objects training frameworks leave beside the weights; they are read as objects without content.
_INERT = re.compile(
    r"(mmengine|mmdet|mmcv|omegaconf)\..+|argparse\.Namespace|yacs\.config\.CfgNode|torch\.device"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|numpy\.dtypes\.\w+DType"
)
# The names of Python 2, which the pickle protocols below 3 use.
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Copies of strided views may take this many times the file's size, and some more: a view that repeats one element
# could otherwise ask for any amount of memory.
_COPY_FACTOR, _COPY_EXTRA = 8, 1 << 24

_MAX_AXES = 64  # NumPy's and PyTorch's own limit.

_CONTAINERS = ("state_dict", "model", "model_state", "network")
_BOOKKEEPING = re.compile(r"(^|\.)_(metadata|extra_state)$")


class _Unreadable(Exception):
    """Says what is wrong with the file, as a part of a sentence that begins with its path."""


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
        clear = isinstance(error, _Unreadable | PermissionError)
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
            raise _Unreadable("it is a zip file without data.pkl, so no PyTorch checkpoint")
        # PyTorch compresses nothing. Entries that do, or that overlap, could unfold into more than the file holds.
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
            raise _Unreadable("it has compressed entries, which PyTorch does not write")
        if sum(entry.file_size for entry in entries) > size:
            raise _Unreadable("its entries are larger than the file")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() != b"little":
            raise _Unreadable("its numbers are not little-endian; save it again on a common machine")

        def load_storage(key, dtype, count):
            data = archive.read(f"{root}data/{key}")
            if len(data) < count * dtype.itemsize:
                raise _Unreadable(f"its storage {key} has {len(data)} bytes, too few for {count} of {dtype}")
            # The copy is writable, and aligned.
            return np.frombuffer(data, np.uint8)[: count * dtype.itemsize].copy().view(dtype)

        return _unpickle(io.BytesIO(archive.read(f"{root}data.pkl")), load_storage, size)


def _read_legacy(path: Path) -> Any:
    # In memory, a false length can ask for no more than there is.
    file = io.BytesIO(path.read_bytes())
    size = file.getbuffer().nbytes
    if _unpickle(file) != _LEGACY_MAGIC:
        raise _Unreadable("it is a pickle, but no PyTorch checkpoint")
    if _unpickle(file) != _LEGACY_PROTOCOL or _unpickle(file).get("little_endian") is not True:
        raise _Unreadable("it is of another format version, or its numbers are not little-endian")
    storages: dict[str, np.ndarray] = {}
    left = size

    def allocate(key, dtype, count):
        nonlocal left
        left -= count * dtype.itemsize
        if left < 0:
            raise _Unreadable(f"its storage {key} should have {count} numbers, more than the file holds")
        storages[key] = np.zeros(count, dtype)
        return storages[key]

    # The storages come last, but only the pickle tells their types: it is read before them for the types, and again
    # after them for the tensors.
    start = file.tell()
    _unpickle(file, allocate, size)
    keys = _unpickle(file)
    if sorted(keys) != sorted(storages):
        raise _Unreadable("its list of storages does not fit its tensors")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages[key].size or file.readinto(storages[key].view(np.uint8)) != storages[key].nbytes:
            raise _Unreadable(f"its storage {key} is cut short or of another length than its tensors say")
    file.seek(start)
    return _unpickle(file, lambda key, dtype, count: storages[key], size)


def _unpickle(file: io.BytesIO, load_storage: Callable | None = None, file_size: int = 0) -> Any:
    """Reads one pickle, from the file's position up to its end. For the arguments, see `_Unpickler`."""
    return _Unpickler(io.BytesIO(_checked(file)), load_storage, file_size).load()


def _checked(file: io.BytesIO) -> bytes:
    """The bytes of the pickle at the file's position, which moves past it; without frames, and fit to be unpickled.

    Nothing runs here. Frames go because unpicklers differ in how they take arguments that cross a frame's end; with
    them, another pickle might run than the one that was looked at.
    """
    start = file.tell()
    pieces, begin = [], start
    for number, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        if opcode.name.startswith("EXT"):
            raise _Unreadable("it uses Python's extension registry, so it would run code when loaded")
        # The unpickler's memo is as long as its highest index.
        if opcode.name.endswith("PUT") and argument > number:
            raise _Unreadable("it is damaged (an object's number is too high)")
        if opcode.name == "FRAME":
            pieces.append(file.getbuffer()[begin:position].tobytes())
            begin = file.tell()
    return b"".join([*pieces, file.getbuffer()[begin : file.tell()].tobytes()])


class _Sealed:
    """A function or NumPy type that a pickle may use but not change: its BUILD opcode ends in `__setstate__`."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __call__(self, *args):
        return self.value(*args)

    def __setstate__(self, state):
        raise _Unreadable("it changes a function, so it would run code when loaded")


class _Inert:
    """Stands for an object of a class that is not known here; takes anything and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    append = extend = add = __setstate__


class _Ordered(collections.OrderedDict):
    """An ordered dict without attributes; PyTorch's state dicts have one, `_metadata`."""

    def __setstate__(self, state):
        pass


class _Dtype:
    """Stands for a NumPy dtype while unpickling: the state of a real one can break NumPy's memory."""

    __slots__ = ("code",)

    def __init__(self, code, *flags):
        if not re.fullmatch(r"[<>|]?[biufcSU]\d+", code):
            raise _Unreadable(f"it has a NumPy array of type {code!r}; only plain numbers and text are read")
        self.code = code

    def __setstate__(self, state):
        order, *fields = state[1:5]
        if order not in ("<", ">", "|") or fields != [None, None, None]:
            raise _Unreadable("it has a NumPy array of a composed type; only plain numbers and text are read")
        self.code = order + self.code.lstrip("<>|")


class _Array(np.ndarray):
    """A NumPy array of a pickle, whose state is looked at before NumPy takes it."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        dtype = _real(dtype)
        if not _are_lengths(shape) or not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
            raise _Unreadable("it has a NumPy array whose shape does not fit its bytes")
        super().__setstate__((1, tuple(shape), dtype, bool(fortran), data))


def _real(dtype: _Dtype) -> np.dtype:
    if not isinstance(dtype, _Dtype):
        raise _Unreadable("it has a NumPy array without a type")
    return np.dtype(dtype.code)


def _scalar(dtype, data):
    (value,) = np.frombuffer(data, _real(dtype))
    return value


def _are_lengths(values: Any) -> bool:
    if not isinstance(values, tuple | list) or len(values) > _MAX_AXES:
        return False
    return all(isinstance(value, int) and value >= 0 for value in values)


def _encode(text, encoding):
    # Python 3 writes its bytes so into pickles for Python 2. Other codecs are modules that would be imported.
    if encoding not in ("latin1", "latin-1"):
        raise _Unreadable("it uses a text encoding other than latin-1")
    return text.encode("latin-1")


def _bytearray(data=b"", encoding="latin-1"):
    # A number would ask for that many bytes.
    return bytearray(data if isinstance(data, bytes) else _encode(data, encoding))


def _reconstructor(kind, base, state):
    return _Inert() if kind is _Inert else _refuse("copyreg._reconstructor")


def _getattr(owner, name):
    # Pickles name the methods of mmengine's HistoryBuffer so.
    return _Inert if owner is _Inert else _refuse("builtins.getattr")


def _factory(kind):
    # Default dicts name these types. With an argument, `str` of nested lists could fill the memory.
    return lambda: kind()


def _refuse(name: str):
    raise _Unreadable(f"it refers to {name}, so it would run code when loaded")


_FUNCTIONS = {
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytearray,
    "builtins.complex": complex,
    "builtins.frozenset": frozenset,
    "builtins.getattr": _getattr,
    "builtins.set": set,
    "builtins.slice": slice,
    "collections.Counter": dict,
    "collections.OrderedDict": _Ordered,
    "collections.defaultdict": collections.defaultdict,
    "copyreg._reconstructor": _reconstructor,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": None,
    "torch.Size": tuple,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _FUNCTIONS[f"{_module}._reconstruct"] = lambda kind, shape, code: np.ndarray.__new__(_Array, (0,), np.int8)
    _FUNCTIONS[f"{_module}.scalar"] = _scalar
for _type in (dict, float, int, list, object, str, tuple):
    _FUNCTIONS[f"builtins.{_type.__name__}"] = _factory(_type)

_ALLOWED = {name: _Sealed(function) for name, function in _FUNCTIONS.items()}
_ALLOWED |= {f"torch.{name}": _Sealed(dtype) for name, dtype in _DTYPES.items()}
_ALLOWED |= {f"torch.{name}": _Sealed(_DTYPES[dtype]) for name, dtype in _STORAGES.items()}
_ALLOWED |= {f"{module}.UntypedStorage": _Sealed(_DTYPES["uint8"]) for module in ("torch", "torch.storage")}


class _Unpickler(pickle.Unpickler):
    """Knows only the names above.

    Args:
      file: a checked pickle.
      load_storage: (key, dtype, count) -> array[count], called once a storage; None where no tensors belong.
      file_size: bytes, the measure of the copies that may be made.
    """

    def __init__(self, file: io.BytesIO, load_storage: Callable | None, file_size: int):
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage
        self._storages: dict[str, np.ndarray] = {}
        self._copies_left = _COPY_FACTOR * file_size + _COPY_EXTRA
        self._rebuild = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *ignored: data,
        }

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{_OLD_MODULES.get(module, module)}.{name}"
        if dotted in self._rebuild:
            return _Sealed(self._rebuild[dotted])
        if _INERT.fullmatch(dotted):
            return _Inert
        return _ALLOWED[dotted] if dotted in _ALLOWED else _refuse(dotted)

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage, as an array of one axis."""
        if self._load_storage is None or not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise _Unreadable("it refers to something that is no storage of a tensor")
        _, kind, key, _, count, *view = pid
        dtype = kind.value if isinstance(kind, _Sealed) else None
        if not isinstance(dtype, np.dtype) or not isinstance(key, str) or not _are_lengths([count]):
            raise _Unreadable("it has a storage of an unknown type")
        if key not in self._storages:
            self._storages[key] = self._load_storage(key, dtype, count)
        storage = self._storages[key]
        if (storage.dtype, storage.size) != (dtype, count):
            raise _Unreadable(f"it describes the storage {key} in two ways")
        # Old files have views of storages: (key, offset, size).
        if view and view[0] is not None:
            _, offset, length = view[0]
            if not _are_lengths([offset, length]) or offset + length > count:
                raise _Unreadable(f"it has a view beyond the end of the storage {key}")
            storage = storage[offset : offset + length]
        return storage

    def _tensor(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
        """An array of `shape`; offset and strides count elements of the storage."""
        # Arrays of NumPy's own pickles may not come in: their memory can still be exchanged.
        if type(storage) is not np.ndarray or storage.ndim != 1:
            raise _Unreadable("it has a tensor without a storage")
        if metadata:
            raise _Unreadable("it has a tensor that is conjugate or negative by a flag; resolve it before saving")
        if not (_are_lengths([offset]) and _are_lengths(shape) and _are_lengths(strides) and len(shape) == len(strides)):
            raise _Unreadable("it has a tensor of impossible shape, strides or offset")
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, storage.dtype)
        if offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) >= storage.size:
            raise _Unreadable(f"it has a tensor of shape {tuple(shape)} that reaches beyond its storage")
        if all(n == 1 or stride == math.prod(shape[axis + 1 :]) for axis, (n, stride) in enumerate(zip(shape, strides))):
            return storage[offset : offset + count].reshape(shape)
        self._copies_left -= count * storage.itemsize
        if self._copies_left < 0:
            raise _Unreadable("it has views that repeat their elements far beyond the size of the file")
        # An axis of length 1 may have any stride, even one that does not fit NumPy's.
        steps = [stride * storage.itemsize if n > 1 else 0 for n, stride in zip(shape, strides)]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy(order="C")


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
    classes = {_DTYPES[dtype]: name for name, dtype in _STORAGES.items()}
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
