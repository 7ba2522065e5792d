"""Files of weights that claim more than they hold, are encrypted or damaged, or hold what no weight can be."""

import struct
import zipfile

import numpy as np
import pytest

from hpr_jax.errors import UserError
from hpr_jax.weights import arrays_file
from hpr_jax.weights.arrays_file import read_arrays
from hpr_jax.weights.torch_file import write_checkpoint
from hpr_jax.weights.weights_file import read_weights

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3), "empty": np.zeros((0, 4))}


def npz(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays(tmp_path, compressed):
    read = read_arrays(npz(tmp_path / "w.npz", compressed, **ARRAYS))
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def claim(path, shape):
    """An array of no bytes that claims a shape."""
    header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content)


def test_a_shape_that_the_file_cannot_hold(tmp_path):
    claim(tmp_path / "w.npz", (10**6, 10**6))
    assert (tmp_path / "w.npz").stat().st_size < 300
    with pytest.raises(UserError, match=r"a.npy claims to have the shape \(1000000, 1000000\)"):
        read_arrays(tmp_path / "w.npz")


def test_a_file_that_unfolds(tmp_path, monkeypatch):
    monkeypatch.setattr("hpr_jax.weights.arrays_file.MOST_MORE", 0)
    npz(tmp_path / "w.npz", compressed=True, a=np.zeros(10**6))
    with pytest.raises(UserError, match="claim more than 100 times the size of the file"):
        read_arrays(tmp_path / "w.npz")


def test_encrypted_entries(tmp_path):
    data = bytearray(npz(tmp_path / "w.npz", **ARRAYS).read_bytes())
    for start in (data.find(b"PK\x03\x04") + 6, data.find(b"PK\x01\x02") + 8):
        data[start] |= 1
    (tmp_path / "w.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"a.weight.npy is encrypted"):
        read_arrays(tmp_path / "w.npz")


def test_all_arrays_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_file, "MOST_TIMES", 2)
    monkeypatch.setattr(arrays_file, "MOST_MORE", 1000)
    few, many = ({f"a{number}": np.zeros(500, np.float32) for number in range(count)} for count in (1, 20))
    assert read_arrays(npz(tmp_path / "w.npz", compressed=False, **many)).keys() == many.keys()
    with pytest.raises(UserError, match="claim more than 2 times the size"):
        read_arrays(npz(tmp_path / "w.npz", compressed=True, **few))
    monkeypatch.setattr(arrays_file, "MOST_MORE", 10_000)
    assert read_arrays(npz(tmp_path / "w.npz", compressed=True, **few)).keys() == few.keys()
    with pytest.raises(UserError, match="claim more than 2 times the size"):
        read_arrays(npz(tmp_path / "w.npz", compressed=True, **many))


def test_objects_are_not_made(tmp_path):
    npz(tmp_path / "w.npz", a=np.array([print], dtype=object))
    with pytest.raises(UserError, match=r"a.npy holds Python objects"):
        read_arrays(tmp_path / "w.npz")


def test_files_of_no_arrays(tmp_path):
    for content in (b"", b"no archive"):
        (tmp_path / "w.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"w.npz is damaged, cut short, or not an .npz file"):
            read_arrays(tmp_path / "w.npz")
    with pytest.raises(UserError, match="does not exist"):
        read_arrays(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match="is no file"):
        read_arrays(tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_any_damage_gets_a_sentence_or_changes_an_array(tmp_path, compressed):
    """Each byte of a small file is changed in three ways."""
    whole = npz(tmp_path / "w.npz", compressed, a=np.arange(3, dtype=np.float32)).read_bytes()
    refused = 0
    for place in range(len(whole)):
        for bits in (0x01, 0x80, 0xFF):
            data = bytearray(whole)
            data[place] ^= bits
            (tmp_path / "w.npz").write_bytes(data)
            try:
                read_arrays(tmp_path / "w.npz")
            except UserError:
                refused += 1
    assert refused > len(whole)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.array([1, np.nan], np.float32), r"a.weight \(float32\) has values that are no finite numbers"),
        (np.array([np.inf], np.float16), r"a.weight \(float16\) has values that are no finite"),
        (np.array([1j], np.complex64), r"a.weight \(complex64\) has complex numbers"),
    ],
)
def test_numbers_that_no_weight_can_be(tmp_path, suffix, value, sentence):
    path, tensors = tmp_path / f"w{suffix}", {**ARRAYS, "a.weight": value}
    if suffix == ".pth":
        write_checkpoint(path, tensors, {})
    else:
        npz(path, **tensors)
    with pytest.raises(UserError, match=f"w{suffix} cannot be used: {sentence}"):
        read_weights(path)[0]


def test_text_is_no_number(tmp_path):
    with pytest.raises(UserError, match=r"a \(<U4\) has values that are no finite numbers"):
        read_weights(npz(tmp_path / "w.npz", a=np.array(["text"])))
