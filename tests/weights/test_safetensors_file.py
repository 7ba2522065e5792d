"""Files in the safetensors format: every type, what strangers could do wrong, and what is written."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from hpr_jax.errors import UserError
from hpr_jax.weights import safetensors_file
from hpr_jax.weights.safetensors_file import read_safetensors, write_safetensors
from hpr_jax.weights.weights_file import read_weights


def raw(header, data=b"", length=None):
    """A file, of a header as JSON or as bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("kind", "data", "values"),
    [
        ("F64", struct.pack("<2d", 1.5, -2), [1.5, -2]),
        ("F32", struct.pack("<2f", 1.5, -2), [1.5, -2]),
        ("F16", struct.pack("<2e", 1.5, -2), [1.5, -2]),
        # The upper half of a float32.
        ("BF16", b"\xc0\x3f\x00\xc0", [1.5, -2]),
        ("I64", struct.pack("<2q", 2**40, -3), [2**40, -3]),
        ("I32", struct.pack("<2i", 7, -3), [7, -3]),
        ("I16", struct.pack("<2h", 7, -3), [7, -3]),
        ("I8", struct.pack("<2b", 7, -3), [7, -3]),
        ("U64", struct.pack("<2Q", 2**63, 3), [2**63, 3]),
        ("U32", struct.pack("<2I", 2**31, 3), [2**31, 3]),
        ("U16", struct.pack("<2H", 2**15, 3), [2**15, 3]),
        ("U8", b"\xff\x03", [255, 3]),
        ("BOOL", b"\x01\x00", [True, False]),
    ],
)
def test_types(tmp_path, kind, data, values):
    header = {"__metadata__": {"a": "text"}, "x": entry(kind, [2, 1], 0, len(data))}
    (tmp_path / "w.safetensors").write_bytes(raw(header, data))
    tensors, texts = read_weights(tmp_path / "w.safetensors")
    assert texts == {"a": "text"}
    assert tensors["x"].shape == (2, 1)
    assert tensors["x"].dtype.name.startswith({"F": "float", "B": "b", "I": "int", "U": "uint"}[kind[0]])
    assert tensors["x"].ravel().tolist() == values
    # What is written again is the same file but for the padding of the header.
    write_safetensors(tmp_path / "again.safetensors", tensors, texts)
    again, same = read_safetensors(tmp_path / "again.safetensors")
    assert same == texts
    assert again["x"].dtype == tensors["x"].dtype
    np.testing.assert_array_equal(again["x"], tensors["x"])


def test_shapes_and_strides(tmp_path):
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    given = {"turned": square.T, "scalar": np.array(3.5), "empty": np.zeros((0, 4)), "big": square.astype(">f4")}
    write_safetensors(tmp_path / "w.safetensors", given, {})
    read, texts = read_safetensors(tmp_path / "w.safetensors")
    assert texts == {}
    assert read.keys() == given.keys()
    for name, array in given.items():
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it has 0 bytes, fewer than any such file"),
        (b"\x07" + bytes(7), "its header claims 7 bytes, and the file has 8"),
        (raw({}, length=2**63), f"its header claims {2**63} bytes, and the file has 10"),
        (raw(b"[" * 5000), "is damaged"),
        (raw(b'{"a": ' * 5000), "is damaged"),
        (raw({"a": entry("F32", [2], 0, 8)}, bytes(7)), "is damaged"),
        (raw({"a": entry("F32", [2], 0, 8)}, bytes(9)), "is damaged"),
        (raw({"a": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8)), "is damaged"),
        (raw({"a": entry("F32", [3], 0, 8)}, bytes(8)), "is damaged"),
        (raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, bytes(8)), "is damaged"),
        (raw({"a": entry("F32", [2], 8, 0)}, bytes(8)), "is damaged"),
        (raw({"a": entry("F32", [-2], 0, 8)}, bytes(8)), "is damaged"),
        (raw({"a": entry("FLOAT", [2], 0, 8)}, bytes(8)), "is damaged"),
        (raw({"__metadata__": {"a": 1}}), "is damaged"),
        (raw({"__metadata__": {"a": {"b": "c"}}}), "is damaged"),
        (raw(b'{"\xff": 1}'), "is damaged"),
        (raw({"a\n": entry("F8_E4M3", [2], 0, 2)}, bytes(2)), r"'a\\n' is of the type F8_E4M3; convert it to one of F16"),
        (raw({"a": entry("F32", [2], 0, 8)}, struct.pack("<2f", 1, np.nan)), r"a \(float32\) has values that are no finite"),
        (raw({"a": entry("F16", [1], 0, 2)}, b"\x00\x7c"), r"a \(float16\) has values that are no finite"),
        (raw({"a": entry("BF16", [1], 0, 2)}, b"\x80\x7f"), r"a \(bfloat16\) has values that are no finite"),
        (raw({"a": entry("C64", [1], 0, 8)}, bytes(8)), r"a \(complex64\) has complex numbers"),
    ],
)
def test_files_that_are_refused(tmp_path, content, sentence):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"w\.safetensors .*{sentence}"):
        read_weights(tmp_path / "w.safetensors")


def test_long_headers_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw({"__metadata__": {"a": "x" * 100}}))
    assert read_safetensors(path) == ({}, {"a": "x" * 100})
    monkeypatch.setattr(safetensors_file, "MOST_HEADER", 100)
    with pytest.raises(UserError, match="more than the 100 that are read"):
        read_safetensors(path)


def test_places_without_a_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(UserError, match="is no file"):
        read_weights(tmp_path / "w.safetensors")


def test_files_may_be_read_by_whoever_may_read_others(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {"a": np.zeros(1)}, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    for wrong in (np.array(["text"]), np.zeros(1, ml_dtypes.float8_e4m3fn), np.zeros(1, np.complex128)):
        with pytest.raises(UserError, match=r"a is of type .*; safetensors files are written of F16"):
            write_safetensors(tmp_path / "w.safetensors", {"a": wrong}, {})
    with pytest.raises(UserError, match=r"nowhere.w\.safetensors cannot be written: .*\.$"):
        write_safetensors(tmp_path / "nowhere/w.safetensors", {"a": np.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []
