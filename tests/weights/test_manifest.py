"""Damage to any file of a folder with a manifest is found."""

import json
import shutil

import pytest
import tiny

from hpr_jax.errors import UserError
from hpr_jax.weights.manifest import NAME, find_damage, write_manifest

# Kinds of files that checkpoints have: without suffix, hidden, with a leading underscore, several folders deep, empty.
FILES = (
    "_CHECKPOINT_METADATA",
    ".hidden",
    "meta/metadata",
    "meta/_deep/.er/file.json",
    "model/_METADATA",
    "model/d/0a1b",
    "model/ocdbt.process_0/d/9f",
    "model/manifest.ocdbt",
    "model/manifest.json",
    "training/array_metadatas/process_0",
    "training/empty",
    "name with blanks",
)


@pytest.fixture
def folder(tmp_path):
    """A folder with these files and a manifest."""
    for number, name in enumerate(FILES):
        path = tmp_path / "5" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if name.endswith("empty") else f"content {number}".encode() * (number + 1))
    write_manifest(tmp_path / "5")
    return tmp_path / "5"


def test_every_file_is_listed_with_its_size(folder):
    listed = json.loads((folder / NAME).read_text())
    assert listed.keys() == set(FILES)
    assert {name: size for name, (size, _) in listed.items()} == {name: (folder / name).stat().st_size for name in FILES}
    assert len({digest for _, digest in listed.values()}) == len(FILES)
    assert find_damage(folder) is None


@pytest.mark.parametrize("name", FILES)
class TestEachFile:
    def test_changed(self, folder, name):
        """By one bit, so that the size is the same; an empty file by one byte."""
        content = bytearray((folder / name).read_bytes() or b"\0")
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        assert find_damage(folder) == f"{name} has changed since it was written"

    def test_longer(self, folder, name):
        (folder / name).write_bytes((folder / name).read_bytes() + b"\0")
        assert find_damage(folder) == f"{name} has changed since it was written"

    def test_removed(self, folder, name):
        (folder / name).unlink()
        assert find_damage(folder) == f"{name} is missing"

    def test_renamed(self, folder, name):
        (folder / name).rename((folder / name).with_name("another"))
        assert find_damage(folder) == f"{name} is missing"

    def test_a_folder_in_its_place(self, folder, name):
        (folder / name).unlink()
        (folder / name).mkdir()
        assert find_damage(folder) == f"{name} is missing"


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("empty")])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_truncated_files(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content))])
    assert find_damage(folder) == f"{name} has changed since it was written"


def test_swapped_contents(folder):
    """All sizes and digests still occur, but not under their names."""
    one, other = folder / "model/d/0a1b", folder / "meta/metadata"
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    assert "has changed" in (find_damage(folder) or "")


def test_a_lost_folder(folder):
    shutil.rmtree(folder / "model")
    damage = find_damage(folder) or ""
    assert damage.startswith("model/")
    assert damage.endswith("is missing")


@pytest.mark.parametrize("name", ["Thumbs.db", "meta/.nfs0001", "model/d/.DS_Store"])
def test_added_files_are_no_damage(folder, name):
    """File managers and file systems add such files."""
    (folder / name).write_bytes(b"x")
    assert find_damage(folder) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": [1]}', '{"a": ["x", "y"]}'])
def test_a_damaged_manifest(folder, content):
    (folder / NAME).write_text(content)
    assert find_damage(folder) == "manifest.json is damaged"


def test_without_a_manifest_nothing_is_damaged(folder):
    """The first checkpoints had none."""
    (folder / NAME).unlink()
    (folder / FILES[0]).unlink()
    assert find_damage(folder) is None


def test_a_checkpoint_with_a_damaged_file_is_not_read(tmp_path):
    """Each file is damaged in turn, and the error names it."""
    from hpr_jax.weights.checkpoint import read_meta

    checkpoint = tmp_path / "3"
    shutil.copytree(tiny.ROOT / "tests/reference_values/unfinished_run/run/checkpoints/3", checkpoint)
    names = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file() and path.name != NAME]
    assert {name.partition("/")[0] for name in names} >= {"meta", "model", "training"}
    assert sorted(json.loads((checkpoint / NAME).read_text())) == sorted(names)
    for name in names:
        path = checkpoint / name
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:] if content else b"x")
        with pytest.raises(UserError, match="is damaged: ") as error:
            read_meta(checkpoint)
        assert name in str(error.value)
        path.write_bytes(content)
    assert read_meta(checkpoint).step == 3
