"""PyTorch checkpoint files: reading both formats, writing, and files that are no checkpoints."""

import collections
import pickle
import pickletools
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch_files import (
    DTYPES,
    FORMATS,
    Call,
    Storage,
    legacy_file,
    legacy_head,
    mmengine_content,
    named,
    read,
    refusal,
    tensor,
    zip_file,
    zipped,
)

from hpr_jax.errors import UserError
from hpr_jax.weights.torch_file import find_tensors, read_checkpoint, write_checkpoint


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
    base = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
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
    assert list(find_tensors(found, "x.pth")) == ["a.weight"]
    np.testing.assert_array_equal(find_tensors(found, "x.pth")["a.weight"], np.arange(12, dtype=np.float32).reshape(3, 4))
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
    found = find_tensors({container: inner, "epoch": 3} if container else inner, "x.pth")
    assert list(found) == ["a", "b"]
    assert list(find_tensors({**tensors, "c": np.ones(1)}, "x.pth")) == ["module.a", "module.b", "c"]


def test_of_several_state_dicts_the_usual_key_decides():
    first, second, third = ({"a": np.full(1, value)} for value in (1, 2, 3))
    assert find_tensors({"network": third, "model": second, "state_dict": first}, "x.pth")["a"] == 1
    assert find_tensors({"network": third, "model": second, "state_dict": None}, "x.pth")["a"] == 2


def test_missing_state_dicts_are_named():
    with pytest.raises(UserError, match="its keys are epoch, weights"):
        find_tensors({"epoch": 1, "weights": {"a": np.ones(1)}}, "x.pth")
    with pytest.raises(UserError, match="no tensors: steps"):
        find_tensors({"state_dict": {"a": np.ones(1), "steps": 3}}, "x.pth")
    with pytest.raises(UserError, match="type list"):
        find_tensors([np.ones(1)], "x.pth")


def test_written_files_come_back(tmp_path):
    path = tmp_path / "out.pth"
    rng = np.random.default_rng(0)
    tensors = {f"w.{dtype}": (rng.normal(size=(2, 3)) * 50).astype(dtype) for dtype in DTYPES}
    tensors |= {"scalar": np.array(2.5), "empty": np.zeros((0, 2)), "transposed": np.arange(6.0).reshape(2, 3).T}
    tensors |= {"special": np.array([np.nan, -0.0, np.inf], np.float32)}
    meta = {"epoch": 3, "big": 2**40, "rate": 1e-3, "text": "ü", "nothing": None, "list": [1, (2, True)], "dict": {"a": {}}}
    path.write_text("an older file")
    write_checkpoint(path, tensors, meta)
    found = read_checkpoint(path)
    assert found["meta"] == meta
    assert list(found["state_dict"]) == list(tensors)
    for name, array in find_tensors(found, "x.pth").items():
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
    write_checkpoint(tmp_path / "out.pth", {"w": np.array([[1, 2]], np.float32)}, {"epoch": 1})
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
