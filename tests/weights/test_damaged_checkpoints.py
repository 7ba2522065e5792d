"""Checkpoints with any damage are told; without the manifest that knows their files, they load or get a sentence."""

import shutil

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mutations import accepted, damaged_bytes, examples, refused

from hpr_jax.errors import UserError
from hpr_jax.weights.checkpoint import META_FILE, load_detector, read_meta

STORED = tiny.ROOT / "tests/reference_values/unfinished_run/run/checkpoints/3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shutil.copytree(STORED, tmp_path_factory.mktemp("run") / "3")


def restored(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(STORED, checkpoint)


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def damage(checkpoint, data):
    """Damages one file or takes it away; returns whether anything has changed."""
    path = data.draw(st.sampled_from(files(checkpoint)))
    if data.draw(st.integers(0, 4)) == 0:
        path.unlink()
        return True
    before = path.read_bytes()
    path.write_bytes(data.draw(damaged_bytes(before)))
    return path.read_bytes() != before


@examples(100, 1000)
@given(st.data())
def test_any_damage_is_told(checkpoint, data):
    """Also that of the manifest, unless the damaged one says the same."""
    restored(checkpoint)
    manifest = (checkpoint / "manifest.json").read_bytes()
    changed = damage(checkpoint, data)
    others = (checkpoint / "manifest.json").exists() and (checkpoint / "manifest.json").read_bytes() == manifest
    try:
        read_meta(checkpoint)
    except UserError as error:
        refused(error, f"{checkpoint} is damaged: ")
    else:
        accepted()
        assert not (changed and others)


@pytest.mark.slow
@examples(15, 500)
@given(st.data())
def test_without_a_manifest(checkpoint, data):
    """As the first checkpoints were written. Not all damages can be seen then."""
    restored(checkpoint)
    meta = (checkpoint / META_FILE).read_text()
    (checkpoint / META_FILE).write_text(meta[: meta.index(', "run": ')] + "}")
    (checkpoint / "manifest.json").unlink()
    damage(checkpoint, data)
    try:
        load_detector(checkpoint)
    except UserError as error:
        refused(error)
    else:
        accepted()
