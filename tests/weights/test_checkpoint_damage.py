"""Checkpoints that lack a part or cannot be read are told, and never passed over."""

import json
import shutil

import jax
import orbax.checkpoint as ocp
import pytest
import tiny

from hpr_jax.errors import UserError
from hpr_jax.weights import find_checkpoint as finding
from hpr_jax.weights.checkpoint import META_FILE, checkpoint_damage, open_reader, read_meta
from hpr_jax.weights.checkpoint_writer import Checkpoints
from hpr_jax.weights.find_checkpoint import checkpoints_in, find_checkpoint

STORED = tiny.ROOT / "tests/reference_values/unfinished_run/run"


@pytest.fixture
def workdir(tmp_path):
    """A copy of a run with one checkpoint, of step 3."""
    return shutil.copytree(STORED, tmp_path / "run")


def lose_meta(checkpoint):
    shutil.rmtree(checkpoint / "meta")


def lose_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


def lose_both(checkpoint):
    lose_meta(checkpoint)
    lose_manifest(checkpoint)


def break_meta(checkpoint):
    lose_manifest(checkpoint)
    (checkpoint / META_FILE).write_text("[")


def empty_manifest(checkpoint):
    shutil.rmtree(checkpoint / "model")
    (checkpoint / "manifest.json").write_text("{}")


DAMAGES = {
    lose_meta: r"meta/\S+ is missing",
    lose_manifest: "manifest.json is missing",
    lose_both: "meta/metadata is missing",
    break_meta: "meta/metadata cannot be read",
    empty_manifest: "model is missing",
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.items())
class TestWhatIsMissing:
    def test_loading(self, workdir, damage, sentence):
        damage(workdir / "checkpoints/3")
        for path in (workdir, workdir / "checkpoints", workdir / "checkpoints/3"):
            with pytest.raises(UserError, match=f"checkpoints/3 is damaged: {sentence}"):
                read_meta(path)

    def test_going_on(self, workdir, damage, sentence, caplog):
        """The run does not begin anew, now or at the next start."""
        damage(workdir / "checkpoints/3")
        for _ in range(2):
            with pytest.raises(UserError, match=r"All checkpoints in .* are damaged: 3.damaged"):
                Checkpoints(workdir, 2).latest_meta()
        assert "checkpoints/3 is damaged (" in caplog.text


def test_an_undamaged_one(workdir):
    assert checkpoint_damage(workdir / "checkpoints/3") is None
    meta = Checkpoints(workdir, 2).latest_meta()
    assert meta is not None
    assert meta.step == 3


def test_the_first_checkpoints_had_no_manifest(workdir):
    """Nor did they say anything about their run."""
    path = workdir / "checkpoints/3"
    lose_manifest(path)
    content = json.loads((path / META_FILE).read_text())
    del content["run"]
    (path / META_FILE).write_text(json.dumps(content))
    assert checkpoint_damage(path) is None
    assert read_meta(workdir).step == 3


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(workdir, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(workdir), "iterdir", refuse)
    for look in (
        lambda: checkpoints_in(workdir / "best"),
        lambda: find_checkpoint(workdir),
        lambda: finding.entries(workdir),
    ):
        with pytest.raises(PermissionError):
            look()


def test_a_file_in_the_place_of_the_folder(workdir):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("")
    with pytest.raises(NotADirectoryError):
        find_checkpoint(workdir)
    with pytest.raises(UserError, match=r"There is no checkpoint in .*/checkpoints, which is a file"):
        find_checkpoint(workdir / "checkpoints")


def test_a_damaged_best_one_is_told_before_the_latest_is_taken(workdir, caplog):
    (workdir / "best/2.damaged/model").mkdir(parents=True)
    assert find_checkpoint(workdir) == workdir / "checkpoints/3"
    assert "best are damaged checkpoints alone: 2.damaged." in caplog.text


def test_a_file_with_the_name_of_a_step(workdir, caplog):
    (workdir / "checkpoints/9").write_text("")
    meta = Checkpoints(workdir, 2).latest_meta()
    assert meta is not None
    assert meta.step == 3
    assert "checkpoints/9 is damaged" in caplog.text


@pytest.mark.parametrize("error", [Exception("line one.\nline two"), RuntimeError(), KeyError("x"), AssertionError("y")])
def test_every_error_of_the_library_is_a_sentence(workdir, error):
    def read():
        with open_reader(workdir) as reader:
            assert isinstance(reader, ocp.Checkpointer)
            raise error

    with pytest.raises(UserError, match=r"cannot be read: it is damaged, or was written by another version of .*t\.$"):
        read()


def test_a_machine_without_the_device_that_is_asked_for_is_no_damage(workdir, monkeypatch):
    def no_devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", no_devices)
    with pytest.raises(UserError, match="JAX has no device to compute on"):
        read_meta(workdir)


def test_of_two_best_checkpoints_the_newer_one_stays(workdir):
    """A kill between saving the one and deleting the other leaves two."""
    for step in ("9", "10"):
        (workdir / "best" / step).mkdir(parents=True, exist_ok=True)
    Checkpoints(workdir, keep=1)
    assert [path.name for path in (workdir / "best").iterdir()] == ["10"]
