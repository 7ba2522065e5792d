"""PyTorch checkpoint files: both formats read, written files, and files that are damaged or mean harm.

The files are made here, with functions and classes that only bear the names of PyTorch's and mmengine's.
"""

import argparse
import collections
import contextlib
import io
import os
import pickle
import pickletools
import re
import struct
import tracemalloc
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hpr_jax.errors import UserError
from hpr_jax.torch_file import find_tensors, read_checkpoint, write_checkpoint

STORAGES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}
STORAGES |= {"int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool"}
DTYPES = [np.dtype(getattr(ml_dtypes, name, name)) for name in STORAGES]
MARK = "unpickled code has run"


class Call:
    """Pickled as the call `function(*arguments)`, and BUILD if there is a state."""

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
    return type(name, (), {"__module__": module, "__qualname__": name})


class Storage:
    def __init__(self, array, view=None):
        self.array, self.view, self.kind = array, view, named_class("torch", STORAGES[array.dtype.name] + "Storage")


class Pickler(pickle._Pickler):
    """Writes names as they are, without a look at the modules, and storages as PyTorch does."""

    def __init__(self, file, legacy=False, protocol=2):
        super().__init__(file, protocol)
        self.legacy, self.storages = legacy, []

    def save_global(self, obj, name=None):
        module = {"builtins": "__builtin__", "copyreg": "copy_reg"}.get(obj.__module__, obj.__module__)
        self.write(pickle.GLOBAL + f"{module}\n{obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch = pickle._Pickler.dispatch | {types.FunctionType: save_global, type: save_global}

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
    arguments = (storage or Storage(array.reshape(-1)), offset, shape, strides, False, collections.OrderedDict())
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
    weight = np.float32(range(12)).reshape(3, 4)
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


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_come_back_bit_exact(tmp_path, packed, dtype):
    array = (np.random.default_rng(0).normal(size=(2, 3)) * 50).astype(dtype)
    found = read(tmp_path, packed({"w": tensor(array)}))["w"]
    assert (type(found), found.dtype, found.shape) == (np.ndarray, dtype, (2, 3))
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_views_share_their_storage(tmp_path, packed, protocol):
    base = np.float32(range(60)).reshape(3, 4, 5)
    storage = Storage(base.reshape(-1))
    part = base[:, ::2, 1:4]
    content = {
        "whole": tensor(base, storage=storage),
        "row": tensor(base[1], storage=storage, offset=20),
        "transposed": tensor(base.transpose(2, 0, 1), storage=storage),
        "part": tensor(part, storage=storage, offset=1),
        "repeated": tensor(base, storage=storage, offset=59, shape=(2, 3), strides=(0, 0)),
        "single": tensor(base, storage=storage, shape=(1, 4), strides=(10**30, 1)),
        "scalar": tensor(base, storage=storage, offset=7, shape=(), strides=()),
        "empty": tensor(np.zeros((0, 3), np.int32)),
        "parameter": Call(named("torch._utils", "_rebuild_parameter"), tensor(base[0, 0]), True, {}),
        "old": Call(named("torch._utils", "_rebuild_tensor"), storage, 5, (2,), (1,)),
    }
    found = read(tmp_path, packed(content, protocol))
    expected = {"whole": base, "row": base[1], "transposed": base.transpose(2, 0, 1), "part": part}
    expected |= {"repeated": np.full((2, 3), 59), "single": base[0, :1, :4], "scalar": np.array(7)}
    expected |= {"empty": np.zeros((0, 3)), "parameter": base[0, 0], "old": np.array([5, 6])}
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].flags.c_contiguous
        np.testing.assert_array_equal(found[name], array)
    assert np.shares_memory(found["whole"], found["row"])


def test_legacy_views_of_storages(tmp_path):
    storage = Storage(np.arange(10), view=("view", 4, 3))
    assert read(tmp_path, legacy_file([tensor(storage.array, storage=storage, shape=(3,))]))[0].tolist() == [4, 5, 6]
    storage.view = ("view", 8, 3)
    assert "beyond" in refusal(tmp_path, legacy_file([tensor(storage.array, storage=storage, shape=(1,))]))


@FORMATS
def test_training_checkpoints_of_mmengine(tmp_path, packed):
    found = read(tmp_path, packed(mmengine_content()))
    assert list(find_tensors(found)) == ["a.weight"]
    np.testing.assert_array_equal(find_tensors(found)["a.weight"], np.float32(range(12)).reshape(3, 4))
    assert found["optimizer"]["state"][0]["step"] == 7
    assert found["meta"]["cfg"] == "model = ..."
    assert found["message_hub"]["info"]["iter"] == 5
    assert found["message_hub"]["info"]["rng"].tolist() == [[1, 2]]
    for foreign in (found["message_hub"]["log_scalars"]["train/loss"], found["meta"]["args"], found["path"]):
        assert not hasattr(foreign, "__dict__")


@FORMATS
def test_plain_objects_come_back(tmp_path, packed):
    content = {"set": {1, 2}, "frozen": frozenset("a"), "slice": slice(1, 9, 2), "complex": 1 + 2j, "bytes": b"\xff\x00"}
    content |= {"bytearray": bytearray(b"\xfe"), "counter": collections.Counter("aab"), "big": 2**100, "tuple": (1, [None])}
    content |= {"text": np.array(["ab", "c"]), "half": np.float16(0.5), "default": collections.defaultdict(list, a=[1])}
    found = read(tmp_path, packed(content))
    np.testing.assert_array_equal(found.pop("text"), content.pop("text"))
    assert found == content


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state", "network", None])
def test_state_dicts_are_found(container):
    tensors = {"module.a": np.ones(2), "module.b": np.zeros(())}
    inner = {**tensors, "_metadata": {}}
    found = find_tensors({container: inner, "epoch": 3} if container else inner)
    assert list(found) == ["a", "b"]
    assert list(find_tensors({**tensors, "c": np.ones(1)})) == ["module.a", "module.b", "c"]


def test_missing_state_dicts_are_named():
    with pytest.raises(UserError, match="its keys are epoch, weights"):
        find_tensors({"epoch": 1, "weights": {"a": np.ones(1)}})
    with pytest.raises(UserError, match="no tensors: steps"):
        find_tensors({"state_dict": {"a": np.ones(1), "steps": 3}})
    with pytest.raises(UserError, match="type list"):
        find_tensors([np.ones(1)])


def test_written_files_come_back(tmp_path):
    path = tmp_path / "out.pth"
    rng = np.random.default_rng(0)
    tensors = {f"w.{dtype}": (rng.normal(size=(2, 3)) * 50).astype(dtype) for dtype in DTYPES}
    tensors |= {"scalar": np.array(2.5), "empty": np.zeros((0, 2)), "transposed": np.arange(6.0).reshape(2, 3).T}
    tensors |= {"special": np.float32([np.nan, -0.0, np.inf])}
    meta = {"epoch": 3, "big": 2**40, "rate": 1e-3, "text": "ü", "nothing": None, "list": [1, (2, True)], "dict": {"a": {}}}
    path.write_text("an older file")
    write_checkpoint(path, tensors, meta)
    found = read_checkpoint(path)
    assert found["meta"] == meta
    assert list(found["state_dict"]) == list(tensors)
    for name, array in find_tensors(found).items():
        assert (array.dtype, array.shape) == (tensors[name].dtype, tensors[name].shape)
        assert array.tobytes() == tensors[name].tobytes()
    assert list(tmp_path.iterdir()) == [path]


def test_written_entries_are_stored_and_aligned(tmp_path):
    write_checkpoint(tmp_path / "out.pth", {"a": np.ones(3), "b": np.ones(5, np.int8)}, {})
    data = (tmp_path / "out.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        entries = archive.infolist()
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
    assert {"archive/data.pkl", "archive/data/0", "archive/data/1"} < {entry.filename for entry in entries}
    for entry in entries:
        name, extra = struct.unpack("<HH", data[entry.header_offset + 26 : entry.header_offset + 30])
        assert (entry.header_offset + 30 + name + extra) % 64 == 0
        assert entry.compress_type == zipfile.ZIP_STORED


def test_written_pickles_name_what_pytorch_knows(tmp_path):
    write_checkpoint(tmp_path / "out.pth", {"w": np.float32([[1, 2]])}, {"epoch": 1})
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        opcodes = list(pickletools.genops(archive.read("archive/data.pkl")))
    names = [argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"]
    state_dict, hooks = "collections OrderedDict", "collections OrderedDict"
    assert names == [state_dict, "torch._utils _rebuild_tensor_v2", "torch FloatStorage", hooks]
    assert max(opcode.proto for opcode, _, _ in opcodes) == 2


def test_unwritable_content_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "out.pth"
    with pytest.raises(UserError, match="w is of type uint16"):
        write_checkpoint(path, {"w": np.ones(2, np.uint16)}, {})
    with pytest.raises(UserError, match="plain"):
        write_checkpoint(path, {}, {"a": np.float64(1)})
    with pytest.raises(UserError, match="cannot be written"):
        write_checkpoint(tmp_path / "nowhere" / "out.pth", {}, {})
    path.write_text("an older file")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="disk full"):
        write_checkpoint(path, {"w": np.ones(2)}, {})
    assert path.read_text() == "an older file"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is no file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no PyTorch checkpoint"),
        (b"hello\n", "no PyTorch checkpoint"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "no PyTorch checkpoint"),
        (b"PK\x03\x04 and no zip", "no PyTorch checkpoint"),
        (pickle.dumps({"a": 1}), "it is a pickle"),
        (legacy_head()[:-5], "no PyTorch checkpoint"),
        (legacy_head(little_endian=False), "little-endian"),
        (zip_file({}, byteorder="big"), "little-endian"),
        (zipped(b"", name="a/b"), r"without data\.pkl"),
        (zipped(pickle.dumps({}), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (legacy_file([tensor(np.ones(4))])[:-1], "cut short"),
        (legacy_file([tensor(np.ones(4))])[:-40], "list of storages|no PyTorch checkpoint"),
    ],
)
def test_other_files_are_refused(tmp_path, data, why):
    assert re.search(why, refusal(tmp_path, data))


def short_string(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def by_name(module, name, arguments=b"(S'true'\nt"):
    return b"c" + f"{module}\n{name}\n".encode() + arguments + b"R."


INERT = b"cmmengine.a\nB\n"
FORBIDDEN = {
    "posix.system": by_name("posix", "system"),
    "os.system": by_name("os", "system"),
    "builtins.eval": by_name("__builtin__", "eval"),
    "builtins.exec": b"\x80\x04" + short_string("builtins") + short_string("exec") + b"\x93.",
    "nt.system": b"\x80\x04" + b"\x95" + struct.pack("<Q", 13) + short_string("nt") + short_string("system") + b"\x93.",
    "os.path.join": b"\x80\x04" + short_string("os") + short_string("path.join") + b"\x93.",
    "subprocess.Popen": b"(S'true'\nisubprocess\nPopen\n.",
    "subprocess.run": b"(csubprocess\nrun\nS'true'\no.",
    "functools.partial": by_name("functools", "partial"),
    "torch.load": by_name("torch", "load"),
    "torch._utils._rebuild_tensor_v2.__globals__": by_name("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "builtins.getattr": b"c__builtin__\ngetattr\n(ctorch._utils\n_rebuild_tensor_v2\nS'__globals__'\ntR.",
    "importlib.import_module": by_name("importlib", "import_module"),
    "mmengineering.run": by_name("mmengineering", "run"),
    "argparse.ArgumentParser": by_name("argparse", "ArgumentParser"),
    "numpy.load": by_name("numpy", "load"),
    "hpr_jax.restricted_pickle._Inert": by_name("hpr_jax.restricted_pickle", "_Inert"),
    "copyreg._reconstructor": b"ccopy_reg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.",
    "copyreg.add_extension": by_name("copy_reg", "add_extension"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_names_are_told(tmp_path, name):
    for data in (zipped(FORBIDDEN[name]), legacy_head() + FORBIDDEN[name], FORBIDDEN[name]):
        assert f"refers to {name}, so it would run code when loaded" in refusal(tmp_path, data)


@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(b"\x82\x01.", id="extension registry"),
        pytest.param(b"ctorch._utils\n_rebuild_tensor_v2\nN}S'__defaults__'\n(I1\nts\x86b.", id="function state"),
        pytest.param(b"ccollections\nOrderedDict\n}S'__init__'\nNsb.", id="class state"),
        pytest.param(INERT + b"}S'append'\nNsb.", id="placeholder class state"),
        pytest.param(INERT + b"S'true'\n\x85R" + b"S'true'\n\x85R.", id="call of a placeholder's object"),
        pytest.param(b"c__builtin__\nstr\n(ccollections\nOrderedDict\ntR.", id="constructor with arguments"),
        pytest.param(by_name("__builtin__", "bytearray", b"(L99999999999L\nt"), id="huge bytearray"),
        pytest.param(by_name("_codecs", "encode", b"(S'x'\nS'rot13'\nt"), id="other codecs"),
        pytest.param(b"Nr\xff\xff\xff\x7f.", id="memo index"),
        pytest.param(b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", id="bytearray of false length"),
        pytest.param(b"Pstorage\n.", id="textual persistent id"),
        pytest.param(b"(S'module'\nNNNNtQ.", id="persistent id of a module"),
        pytest.param(b"(S'storage'\ncmmengine.a\nB\nS'0'\nS'cpu'\nI1\ntQ.", id="storage of a foreign type"),
        pytest.param(b"(S'storage'\nctorch\nFloatStorage\nS'9'\nS'cpu'\nI1\ntQ.", id="storage that is not there"),
        pytest.param(by_name("numpy", "dtype", b"(S'O8'\nI0\nI1\nt"), id="object dtype"),
        pytest.param(by_name("numpy", "dtype", b"(S'f4,O'\nI0\nI1\nt"), id="structured dtype"),
    ],
)
def test_other_attacks_do_nothing(tmp_path, pickled):
    refusal(tmp_path, zipped(pickled))


def test_frames_of_false_length_are_passed_over(tmp_path):
    assert read(tmp_path, zipped(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.")) is None
    # The text is longer than its frame; what follows must not be taken for its end.
    assert read(tmp_path, zipped(b"\x80\x04\x95" + struct.pack("<Q", 4) + short_string("text") + b".")) == "text"


def test_placeholders_take_anything(tmp_path):
    pickled = (
        INERT + b"(S'rm'\nI1\ntR" + b"}S'__class__'\nNsb" + b"(S'__dict__'\nI1\nu" + b"(I1\nI2\ne" + b"S'__setstate__'\nNs."
    )
    found = read(tmp_path, zipped(pickled))
    assert type(found).__name__ == "_Inert"
    assert not hasattr(found, "__dict__")


def test_no_code_runs(tmp_path, capfd):
    """What plain `pickle` runs, the reader does not."""
    data = pickle.dumps(Call(os.system, f"echo {MARK}"))
    pickle.loads(data)
    assert MARK in capfd.readouterr().out
    for file in (zipped(data), data, legacy_head() + data):
        refusal(tmp_path, file)
    assert MARK not in capfd.readouterr().out


@pytest.mark.parametrize(
    "state",
    [
        (1, (10**6,), "f8", False, b"1234"),
        (1, (-1, -1), "f8", False, bytes(8)),
        (1, (1,), None, False, bytes(8)),
        (1, (1,), "f8", False, [0]),
    ],
)
def test_numpy_states_are_checked(tmp_path, state):
    dtype = Call(named("numpy", "dtype"), state[2], False, True) if state[2] else None
    state = (*state[:2], dtype, *state[3:])
    rebuild = named("numpy._core.multiarray", "_reconstruct")
    refusal(tmp_path, zip_file([Call(rebuild, named_class("numpy", "ndarray"), (0,), b"b", state=state)]))


@FORMATS
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2, -2), (2, 1)),
        (0, (2, 2), (10**30, 1)),
        (10**30, (1,), (1,)),
        (0, (2**40,), (0,)),
        (0, (2**62, 2**62), (0, 0)),
        (0, (1,) * 65, (1,) * 65),
        (0, (2,), (1, 1)),
        (0, (2.0,), (1,)),
        (0, None, (1,)),
    ],
)
def test_impossible_views_are_refused(tmp_path, packed, offset, shape, strides):
    storage = Storage(np.arange(4))
    arguments = (storage, offset, shape, strides, False, {})
    refusal(tmp_path, packed([Call(named("torch._utils", "_rebuild_tensor_v2"), *arguments)]))


def test_arrays_of_numpy_pickles_are_no_storages(tmp_path):
    """Their memory could be exchanged under the view."""
    refusal(tmp_path, zip_file([Call(named("torch._utils", "_rebuild_tensor_v2"), np.arange(4), 0, (4,), (1,), False, {})]))


@FORMATS
def test_storages_are_no_longer_than_the_file(tmp_path, packed):
    storage = Storage(np.arange(4))
    storage.array = types.SimpleNamespace(size=10**12, tobytes=storage.array.tobytes)
    refusal(tmp_path, packed([tensor(np.arange(4), storage=storage)]))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_damaged_files_raise_nothing_else(tmp_path, kind):
    """Bytes changed or cut off anywhere; changes within the zip format would mostly end at its checksums."""
    rng = np.random.default_rng(0)
    content = mmengine_content()
    whole = legacy_file(content) if kind == "legacy" else zip_file(content)
    with zipfile.ZipFile(io.BytesIO(zip_file(content))) as archive:
        pickled = archive.read("epoch_12/data.pkl")
    storages = [Storage(np.zeros(12, np.float32))] * 3
    tracemalloc.start()
    for trial in range(300):
        data = bytearray(pickled if kind == "pickle" else whole)
        if trial % 4 == 0:
            del data[rng.integers(len(data)) :]
        for _ in range(rng.integers(1, 4)):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        with contextlib.suppress(UserError):
            find_tensors(read(tmp_path, zipped(bytes(data), storages) if kind == "pickle" else bytes(data)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26
