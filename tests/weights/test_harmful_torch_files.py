"""PyTorch checkpoint files that mean harm or are damaged: no code runs, and nothing but a sentence comes of them."""

import io
import os
import pickle
import struct
import types

import numpy as np
import pytest
from torch_files import (
    FORMATS,
    Call,
    Storage,
    legacy_head,
    named,
    named_class,
    read,
    refusal,
    tensor,
    zip_file,
    zipped,
)

from hpr_jax.weights.restricted_pickle import unpickle

MARK = "unpickled code has run"


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
    "hpr_jax.weights.restricted_pickle._Inert": by_name("hpr_jax.weights.restricted_pickle", "_Inert"),
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
    arguments: tuple = (storage, offset, shape, strides, False, {})
    refusal(tmp_path, packed([Call(named("torch._utils", "_rebuild_tensor_v2"), *arguments)]))


def test_arrays_of_numpy_pickles_are_no_storages(tmp_path):
    """Their memory could be exchanged under the view."""
    refusal(tmp_path, zip_file([Call(named("torch._utils", "_rebuild_tensor_v2"), np.arange(4), 0, (4,), (1,), False, {})]))


@FORMATS
def test_storages_are_no_longer_than_the_file(tmp_path, packed):
    storage = Storage(np.arange(4))
    storage.array = types.SimpleNamespace(size=10**12, tobytes=storage.array.tobytes)
    refusal(tmp_path, packed([tensor(np.arange(4), storage=storage)]))


def pairs_of_pairs(depth):
    """The opcodes of a pair whose halves are one pair, whose halves are one pair, and so on."""
    return b"K\x01" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))


@pytest.mark.parametrize(
    ("opcodes", "sentence"),
    [
        (b"}" + pairs_of_pairs(60) + b"K\x02s", "a key of too many parts"),
        (b"}(" + pairs_of_pairs(60) + b"K\x02u", "a key of too many parts"),
        (b"(" + pairs_of_pairs(60) + b"K\x02d", "a key of too many parts"),
        (b"\x8f(" + pairs_of_pairs(60) + b"\x90", "a key of too many parts"),
        (b"(" + pairs_of_pairs(60) + b"\x91", "a key of too many parts"),
        (b"c__builtin__\nfrozenset\n((" + pairs_of_pairs(60) + b"ttR", "a key of too many parts"),
        (b"K\x01" + b"\x85" * 100_000, "nested too deeply"),
        (b"]" * 100_000 + b"a" * 99_999, "nested too deeply"),
        (b"}K\x01" * 1000 + b"Ns" * 1000, "nested too deeply"),
    ],
)
def test_objects_that_would_keep_python_busy_or_crash_it(tmp_path, opcodes, sentence):
    assert sentence in refusal(tmp_path, zipped(b"\x80\x04" + opcodes + b"."))


@pytest.mark.parametrize("protocol", range(6))
def test_common_content_is_neither_deep_nor_large(protocol):
    """Many entries of a container are not deep, and values may share as they like."""
    shared = (1,)
    for _ in range(60):
        shared = (shared, shared)
    content = {f"k{n}": [n, (1, 2), {"a": {"b": [n]}}] for n in range(500)}
    content |= {(1, "two", 3): {4, 5}, frozenset([6]): "x", "shared": [shared]}
    read = unpickle(io.BytesIO(pickle.dumps(content, protocol)))
    assert {key: value for key, value in read.items() if key != "shared"} == {
        key: value for key, value in content.items() if key != "shared"
    }
