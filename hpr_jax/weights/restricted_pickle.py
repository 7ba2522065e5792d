"""A pickle reader that runs no code, for the pickles of PyTorch files.

A pickle may name any Python function and have it called. This reader knows a fixed list of names, to each of which it gives
a harmless stand-in, and refuses every other name.
"""

import collections
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

# PyTorch's storage classes, and the types of their numbers.
STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"}
STORAGES |= {"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16"}
STORAGES |= {"CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}
STORAGES |= {"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"}
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in STORAGES.values()}

# Classes whose objects training frameworks save beside the weights. They are read as objects without content.
_INERT = re.compile(
    r"(mmengine|mmdet|mmcv|omegaconf)\..+|argparse\.Namespace|yacs\.config\.CfgNode|torch\.device"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|numpy\.dtypes\.\w+DType"
)
# Modules under their names of Python 2, which pickle protocols below 3 use, and their names today.
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

# Limit of the memory for copies of strided views: this many times the file's size, and this many bytes more. Without it a
# view that repeats one element could ask for any amount of memory.
_COPY_FACTOR, _COPY_EXTRA = 8, 1 << 24

# Objects may be nested so deeply, and a key of a dict or a member of a set may have so many parts.
_DEEPEST, _MOST_PARTS = 200, 10_000

_MAX_AXES = 64  # NumPy's and PyTorch's own limit.


class Unreadable(Exception):
    """The file cannot be read. The message completes a sentence that begins with the file's path."""


def unpickle(file: io.BytesIO, load_storage: Callable | None = None, file_size: int = 0) -> Any:
    """Reads one pickle, which begins at the file's position, and moves the position behind it.

    Args:
      load_storage, file_size: see `_Unpickler`.

    Raises:
      Unreadable: the pickle uses names or opcodes that are not allowed. A damaged pickle may raise any other error.
    """
    return _Unpickler(io.BytesIO(_checked(file)), load_storage, file_size).load()


def _checked(file: io.BytesIO) -> bytes:
    """The bytes of the pickle at the file's position, without frames; moves the position behind the pickle.

    Nothing is unpickled here. Frames are left out because unpicklers differ in how they read arguments that cross a frame's
    end: with frames, the pickle that is unpickled might be another than the one that was checked.

    Raises:
      Unreadable: the pickle has opcodes that it may not have.
    """
    start = file.tell()
    pieces, begin, sizes = [], start, _Sizes()
    for number, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        if opcode.name.startswith("EXT"):
            raise Unreadable("it uses Python's extension registry, so it would run code when loaded")
        # The unpickler's memo takes memory for all indices up to the highest.
        if opcode.name.endswith("PUT") and (argument is None or argument > number):
            raise Unreadable("it is damaged (an object's number is too high)")
        sizes.follow(opcode, argument)
        if opcode.name == "FRAME":
            pieces.append(file.getbuffer()[begin:position].tobytes())
            begin = file.tell()
    return b"".join([*pieces, file.getbuffer()[begin : file.tell()].tobytes()])


class _Sizes:
    """Follows a pickle without making its objects, and refuses those that would keep Python busy for ever, or crash it.

    A key of a dict or a member of a set is hashed, with everything in it. Tuples of tuples that share their parts are small
    in a file, and endless for whoever goes through them; lists and dicts in lists are gone through by Python's own stack.
    Of each object on the stack its depth is known, and its size with all parts, shared or not. Lists and dicts have a size
    of 1 as a part, since they cannot be hashed.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[int, int] | None] = []
        self.memo: dict[int, tuple[int, int]] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Does what an opcode does to the stack.

        Raises:
          Unreadable: what is made is too deep or too large.
        """
        name = opcode.name
        if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if argument is None else argument] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo.get(argument, (0, 1)))
        elif name == "MARK":
            self.stack.append(None)
        elif name == "DUP":
            self.stack.append(self._top())
        elif name == "POP":
            self._pop(1)
        else:
            self._make(opcode)

    def _make(self, opcode: pickletools.OpcodeInfo) -> None:
        """Takes the parts of an object from the stack, and puts the object there."""
        name, before = opcode.name, opcode.stack_before
        if not before:
            # A number, a text, an empty container.
            self.stack.append((0, 1))
            return
        parts: list[tuple[int, int]] = []
        marked = pickletools.markobject in before
        if marked:
            while self.stack and (part := self.stack.pop()) is not None:
                parts.append(part)
            parts.reverse()
        owned = self._pop(before.index(pickletools.markobject) if marked else len(before))
        if name in ("SETITEM", "APPEND"):
            parts, owned = owned[1:], owned[:1]
        if name in ("SETITEM", "SETITEMS", "DICT"):
            hashed = parts[::2]
        elif name in ("ADDITEMS", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"):
            hashed = [*owned, *parts]
        else:
            hashed = []
        if any(size > _MOST_PARTS for _, size in hashed):
            raise Unreadable("it has a key of too many parts")
        if name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "ADDITEMS"):
            # What is added lies in the container, which stays where it is.
            depth = max([owned[0][0] if owned else 0, *(1 + depth for depth, _ in parts)])
        else:
            parts = [*owned, *parts]
            depth = 1 + max((depth for depth, _ in parts), default=-1)
        if depth > _DEEPEST:
            raise Unreadable("its objects are nested too deeply")
        size = 1 + sum(size for _, size in parts) if name.startswith(("TUPLE", "FROZENSET")) else 1
        self.stack += [(depth, min(size, _MOST_PARTS + 1))] * len(opcode.stack_after)

    def _top(self) -> tuple[int, int]:
        return (self.stack[-1] if self.stack else None) or (0, 1)

    def _pop(self, count: int) -> list[tuple[int, int]]:
        taken = self.stack[len(self.stack) - count :] if count else []
        del self.stack[len(self.stack) - len(taken) :]
        return [part or (0, 1) for part in taken]


class _Sealed:
    """A function or NumPy type that a pickle may use but not change: the opcode BUILD would set its attributes, but calls
    `__setstate__` where there is one."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __call__(self, *args):
        return self.value(*args)

    def __setstate__(self, state):
        raise Unreadable("it changes a function, so it would run code when loaded")


class _Inert:
    """Stands for an object of a class in `_INERT`; accepts any content and drops it."""

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
    """Stands for a NumPy dtype while unpickling: a pickle could give a real one a state that corrupts NumPy's memory."""

    __slots__ = ("code",)

    def __init__(self, code, *flags):
        if not re.fullmatch(r"[<>|]?[biufcSU]\d+", code):
            raise Unreadable(f"it has a NumPy array of type {code!r}; only plain numbers and text are read")
        self.code = code

    def __setstate__(self, state):
        order, *fields = state[1:5]
        if order not in ("<", ">", "|") or fields != [None, None, None]:
            raise Unreadable("it has a NumPy array of a composed type; only plain numbers and text are read")
        self.code = order + self.code.lstrip("<>|")


class _Array(np.ndarray):
    """An array in NumPy's own pickle format, whose state is checked before NumPy takes it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        dtype = _real(dtype)
        if not _are_lengths(shape) or not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
            raise Unreadable("it has a NumPy array whose shape does not fit its bytes")
        # NumPy's stubs ask for a NumPy bool, its implementation for a Python one.
        super().__setstate__((1, tuple(shape), dtype, bool(fortran), data))  # type: ignore[arg-type]


def _real(dtype: Any) -> np.dtype:
    """The NumPy dtype that a `_Dtype` stands for."""
    if not isinstance(dtype, _Dtype):
        raise Unreadable("it has a NumPy array without a type")
    return np.dtype(dtype.code)


def _scalar(dtype, data):
    (value,) = np.frombuffer(data, _real(dtype))
    return value


def _are_lengths(values: Any) -> bool:
    """Whether the values are a sequence of integers >= 0, of at most as many as an array can have axes."""
    if not isinstance(values, tuple | list) or len(values) > _MAX_AXES:
        return False
    return all(isinstance(value, int) and value >= 0 for value in values)


def _encode(text, encoding):
    # Python 3 writes bytes as a call of this function into pickles for Python 2. Other codecs would import modules.
    if encoding not in ("latin1", "latin-1"):
        raise Unreadable("it uses a text encoding other than latin-1")
    return text.encode("latin-1")


def _bytearray(data=b"", encoding="latin-1"):
    # A number as data would ask for that many bytes.
    return bytearray(data if isinstance(data, bytes) else _encode(data, encoding))


def _reconstructor(kind, base, state):
    return _Inert() if kind is _Inert else _refuse("copyreg._reconstructor")


def _getattr(owner, name):
    # mmengine's HistoryBuffer has methods in its state, which pickles name by this function.
    return _Inert if owner is _Inert else _refuse("builtins.getattr")


def _factory(kind):
    # Default dicts name these types, without arguments. With one, `str` of nested lists could fill the memory.
    return lambda: kind()


def _refuse(name: str) -> NoReturn:
    raise Unreadable(f"it refers to {name}, so it would run code when loaded")


# The names that a pickle may use, and what is called or handed out in their place.
_FUNCTIONS: dict[str, Any] = {
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
_ALLOWED |= {f"torch.{name}": _Sealed(dtype) for name, dtype in DTYPES.items()}
_ALLOWED |= {f"torch.{name}": _Sealed(DTYPES[dtype]) for name, dtype in STORAGES.items()}
_ALLOWED |= {f"{module}.UntypedStorage": _Sealed(DTYPES["uint8"]) for module in ("torch", "torch.storage")}


class _Unpickler(pickle.Unpickler):
    """Unpickles with the allowed names alone.

    Args:
      file: a pickle that `_checked` returned.
      load_storage: (key, dtype, count) -> `[count]`, called once for each storage; None where a pickle may have no tensors.
      file_size: in bytes; limits the memory for copies.
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
        """A storage as an array `[count]`, or a view of it, from PyTorch's description of the storage."""
        if self._load_storage is None or not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Unreadable("it refers to something that is no storage of a tensor")
        _, kind, key, _, count, *view = pid
        dtype = kind.value if isinstance(kind, _Sealed) else None
        if not isinstance(dtype, np.dtype) or not isinstance(key, str) or not _are_lengths([count]):
            raise Unreadable("it has a storage of an unknown type")
        if key not in self._storages:
            self._storages[key] = self._load_storage(key, dtype, count)
        storage = self._storages[key]
        if (storage.dtype, storage.size) != (dtype, count):
            raise Unreadable(f"it describes the storage {key} in two ways")
        # Old files have views of storages: (key, offset, size).
        if view and view[0] is not None:
            _, offset, length = view[0]
            if not _are_lengths([offset, length]) or offset + length > count:
                raise Unreadable(f"it has a view beyond the end of the storage {key}")
            storage = storage[offset : offset + length]
        return storage

    def _tensor(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
        """A tensor as an array of `shape`: a view of its storage if contiguous, else a copy. Offset and strides count the
        elements of the storage."""
        # An array in NumPy's own pickle format is no storage: the pickle could still exchange its memory under the view.
        if type(storage) is not np.ndarray or storage.ndim != 1:
            raise Unreadable("it has a tensor without a storage")
        if metadata:
            raise Unreadable("it has a tensor that is conjugate or negative by a flag; resolve it before saving")
        if not (_are_lengths([offset]) and _are_lengths(shape) and _are_lengths(strides) and len(shape) == len(strides)):
            raise Unreadable("it has a tensor of impossible shape, strides or offset")
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, storage.dtype)
        if offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) >= storage.size:
            raise Unreadable(f"it has a tensor of shape {tuple(shape)} that reaches beyond its storage")
        if all(n == 1 or stride == math.prod(shape[axis + 1 :]) for axis, (n, stride) in enumerate(zip(shape, strides))):
            return storage[offset : offset + count].reshape(shape)
        self._copies_left -= count * storage.itemsize
        if self._copies_left < 0:
            raise Unreadable("it has views that repeat their elements far beyond the size of the file")
        # Axes of length 1 may have any stride, even one that is too large for NumPy.
        steps = [stride * storage.itemsize if n > 1 else 0 for n, stride in zip(shape, strides)]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy(order="C")
