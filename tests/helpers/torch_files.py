"""Makes PyTorch checkpoint files without PyTorch: stand-ins are pickled under the names of its functions and classes."""

import argparse
import collections
import io
import pickle
import struct
import types
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpr_jax.errors import UserError
from hpr_jax.weights.torch_file import read_checkpoint

STORAGES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}
STORAGES |= {"int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool"}
DTYPES = [np.dtype(getattr(ml_dtypes, name, name)) for name in STORAGES]


class Call:
    """Pickled as the call `function(*arguments)`, followed by the opcode BUILD if there is a state."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce_ex__(self, protocol):
        return self.reduced


def named(module, name):
    """A function that is pickled under another name."""
    function = types.FunctionType((lambda: None).__code__, {})
    function.__module__, function.__qualname__ = module, name
    return function


def named_class(module, name):
    """A class that is pickled under this name."""
    return type(name, (), {"__module__": module, "__qualname__": name})


class Storage:
    """The numbers of tensors, `[n]`; `view` is what files of the older format say of a view of a storage."""

    def __init__(self, array, view=None):
        self.array, self.view, self.kind = array, view, named_class("torch", STORAGES[array.dtype.name] + "Storage")


# Python's pickler in Python, since the one in C has no method for names. The stubs lack that method, too.
_PythonPickler: Any = pickle._Pickler


class Pickler(_PythonPickler):
    """Writes names without importing their modules, and storages as PyTorch does."""

    def __init__(self, file, legacy=False, protocol=2):
        super().__init__(file, protocol)
        self.legacy, self.storages = legacy, []

    def save_global(self, obj, name=None):
        module = {"builtins": "__builtin__", "copyreg": "copy_reg"}.get(obj.__module__, obj.__module__)
        self.write(pickle.GLOBAL + f"{module}\n{obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch = _PythonPickler.dispatch | {types.FunctionType: save_global, type: save_global}

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        key = str(self.storages.index(obj))
        return ("storage", obj.kind, key, "cuda:0", obj.array.size, *([obj.view] if self.legacy else []))


def tensor(array, *, storage=None, offset=0, shape=None, strides=None):
    array = np.asarray(array)
    shape = array.shape if shape is None else shape
    strides = tuple(s // array.itemsize for s in array.strides) if strides is None else strides
    arguments: tuple = (storage or Storage(array.reshape(-1)), offset, shape, strides, False, collections.OrderedDict())
    return Call(named("torch._utils", "_rebuild_tensor_v2"), *arguments)


def zipped(pickled, storages=(), name="epoch_12", compression=zipfile.ZIP_STORED, **entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{name}/data.pkl", pickled)
        for key, storage in enumerate(storages):
            archive.writestr(f"{name}/data/{key}", storage.array.tobytes())
        for entry, data in entries.items():
            archive.writestr(f"{name}/{entry}", data)
    return file.getvalue()


def zip_file(content, protocol=2, **entries):
    file = io.BytesIO()
    pickler = Pickler(file, protocol=protocol)
    pickler.dump(content)
    return zipped(file.getvalue(), pickler.storages, version="3\n", **entries)


def legacy_head(little_endian=True):
    info = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, info))


def legacy_file(content, protocol=2):
    file = io.BytesIO()
    pickler = Pickler(file, legacy=True, protocol=protocol)
    pickler.dump(content)
    parts = [legacy_head(), file.getvalue(), pickle.dumps([str(n) for n in range(len(pickler.storages))], protocol)]
    for storage in pickler.storages:
        parts += [struct.pack("<q", storage.array.size), storage.array.tobytes()]
    return b"".join(parts)


FORMATS = pytest.mark.parametrize("packed", [zip_file, legacy_file])


def mmengine_content():
    """A training checkpoint as mmengine leaves it."""
    buffer = named_class("mmengine.logging.history_buffer", "HistoryBuffer")
    newobj = named("copyreg", "__newobj__")
    newobj.__name__ = "__newobj__"
    history = buffer()
    method = Call(named("builtins", "getattr"), buffer, "mean")
    history.__dict__ = {"_log_history": np.arange(300.0), "_statistics_methods": {"mean": method}}
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    moments = {0: {"step": tensor(np.float32(7)), "exp_avg": tensor(weight * 2)}}
    return {
        "meta": {"epoch": 12, "cfg": "model = ...", "seed": None, "args": argparse.Namespace(work_dir="x")},
        "state_dict": Call(named("collections", "OrderedDict"), [["a.weight", tensor(weight)]], state={"_metadata": {}}),
        "message_hub": {"log_scalars": {"train/loss": history}, "info": {"iter": np.int64(5), "rng": np.array([[1, 2]])}},
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "path": Call(named_class("pathlib", "PosixPath"), "/", "tmp"),
    }


def read(tmp_path, data):
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    return read_checkpoint(path)


def refusal(tmp_path, data):
    with pytest.raises(UserError) as caught:
        read(tmp_path, data)
    text = str(caught.value)
    assert str(tmp_path / "weights.pth") in text
    assert text.endswith(".")
    assert "\n" not in text
    return text
