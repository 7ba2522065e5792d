"""Weight files with any damage are read, or get a sentence; they take neither the machine's time nor its memory."""

import functools
import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import accepted, damaged_bytes, examples, refused
from safetensors.numpy import save
from torch_files import Storage, legacy_file, mmengine_content, zip_file, zipped

from hpr_jax.errors import UserError
from hpr_jax.weights.weights_file import read_weights

# What reading a damaged file of some kilobytes may take, in bytes.
MOST_MEMORY = 2**26


def npz(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@functools.cache
def whole_files() -> dict[str, bytes]:
    """Files of all containers, and of two containers what is in them, which their checksums would else protect."""
    content = mmengine_content()
    with zipfile.ZipFile(io.BytesIO(zip_file(content))) as archive:
        pickled = archive.read("epoch_12/data.pkl")
    array = npy(np.arange(12, dtype=np.float32).reshape(3, 4))
    return {
        "zip.pth": zip_file(content),
        "legacy.pth": legacy_file(content),
        "pickle.pth": pickled,
        "zip.npz": npz(a=array, b=array),
        "array.npz": array,
        "all.safetensors": save({"a": np.arange(12, dtype=np.float32), "b": np.ones((3, 4), np.float16)}, {"text": "c"}),
    }


def packed(kind: str, data: bytes) -> bytes:
    """The file in which something damaged is."""
    if kind == "pickle.pth":
        return zipped(data, [Storage(np.zeros(12, np.float32))] * 3)
    return npz(a=data, b=whole_files()["array.npz"]) if kind == "array.npz" else data


@pytest.fixture(scope="module")
def memory():
    tracemalloc.start()
    yield
    tracemalloc.stop()


# Damaged text in a pickle may be a string with escapes that Python warns of.
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@examples(60, 2000)
@given(st.data())
def test_any_damage(tmp_path_factory, memory, data):
    kind = data.draw(st.sampled_from(sorted(whole_files())))
    path = tmp_path_factory.getbasetemp() / f"damaged{Path(kind).suffix}"
    path.write_bytes(packed(kind, data.draw(damaged_bytes(whole_files()[kind]))))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        tensors = read_weights(path)[0]
    except UserError as error:
        refused(error, str(path))
    else:
        accepted()
        assert all(np.all(np.isfinite(tensor)) for tensor in tensors.values())
    assert tracemalloc.get_traced_memory()[1] - before < MOST_MEMORY


def test_whole_files_are_read(tmp_path):
    for kind, data in whole_files().items():
        path = tmp_path / kind
        path.write_bytes(packed(kind, data))
        assert read_weights(path)[0], kind
