"""Repositories of the Hugging Face hub, for which folders stand in: pulling, pushing, and what can go wrong."""

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax import main as command_line
from hpr_jax.commands.arguments import place
from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.weights import pretrained
from hpr_jax.weights.checkpoint import Meta, read_meta
from hpr_jax.weights.checkpoint_writer import Checkpoints
from hpr_jax.weights.hub import FILES, is_hub, local_path, pull, push
from hpr_jax.weights.source import open_source


class RepositoryNotFoundError(OSError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class OfflineModeIsEnabled(ConnectionError):
    pass


class HfHubHTTPError(OSError):
    response = types.SimpleNamespace(status_code=403)


class Hub(types.ModuleType):
    """Stands for `huggingface_hub`, whose repositories are the folders of one folder."""

    def __init__(self, folder: Path):
        super().__init__("huggingface_hub")
        self.folder = folder
        self.error: Exception | None = None

    def snapshot_download(self, repo_id, *, allow_patterns):
        self._fail()
        if not (self.folder / repo_id).is_dir():
            raise RepositoryNotFoundError("404 Client Error.\nRepository Not Found")
        copy = self.folder / "copies" / repo_id
        for name in allow_patterns:
            if (self.folder / repo_id / name).exists():
                copy.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.folder / repo_id / name, copy)
        return str(copy)

    def create_repo(self, repo_id, *, exist_ok):
        self._fail()
        assert exist_ok
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        (self.folder / repo_id / ".gitattributes").touch()

    def list_repo_files(self, repo_id):
        return [path.name for path in (self.folder / repo_id).iterdir()]

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        assert commit_message
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.folder / repo_id)

    def _fail(self):
        if self.error:
            raise self.error


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


@pytest.fixture
def run(tmp_path):
    """A workdir with a checkpoint."""
    config = tiny.small(Path("/data/mine"))
    detector = abstract_detector(config.model, tiny.CLASSES)
    tiny.fill(detector)
    meta = Meta(to_plain(config), Classes(("cup", "pen", "hat"), (2, 5, 9)), 7, {"AP": 0.5})
    Checkpoints(tmp_path / "run", keep=1).save_best(7, nnx.state(detector), meta)
    return tmp_path / "run"


def same(source, other):
    pairs = zip(*(nnx.to_flat_state(nnx.state(one.load())) for one in (source, other)))
    return all(a == b and np.array_equal(x.get_value(), y.get_value()) for (a, x), (b, y) in pairs)


def test_there_and_back(tmp_path, hub, run, capsys):
    command_line.run(["convert", "--publish", str(run), "hf://me/mine"])
    printed = capsys.readouterr().out
    assert "hf://me/mine: 3 classes. It is loaded by hpr_jax.load('hf://me/mine')." in printed
    assert "It names /data/mine, a place on this machine; --config.data.directory=PLACE publishes another." in printed
    assert sorted(hub.list_repo_files("me/mine")) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert "hpr_jax.load('hf://me/mine')" in (hub.folder / "me/mine/README.md").read_text()
    source = open_source("hf://me/mine")
    assert same(source, open_source(run))
    assert (source.step, source.metrics) == (7, {"AP": 0.5})
    command_line.run(["convert", "hf://me/mine", str(tmp_path / "again")])
    assert same(open_source(tmp_path / "again"), source)
    assert read_meta(tmp_path / "again") == Meta(**{**vars(read_meta(run)), "run": {}})
    # A second time, files would be written over.
    with pytest.raises(UserError, match=r"hf://me/mine has a model\.safetensors already; choose another name"):
        command_line.run(["convert", "--publish", str(run), "hf://me/mine"])


def test_the_other_forms(tmp_path, run, capsys):
    command_line.run(["convert", "--publish", str(run), str(tmp_path / "f"), "--config.data.directory=data/coco"])
    assert "place on this machine" not in capsys.readouterr().out
    assert open_source(tmp_path / "f").config.data.directory == "data/coco"
    command_line.run(["convert", "--publish", str(tmp_path / "f"), str(tmp_path / "w.safetensors")])
    command_line.run(["convert", str(tmp_path / "w.safetensors"), str(tmp_path / "again")])
    assert same(open_source(tmp_path / "again"), open_source(run))


def test_initial_weights(hub, tmp_path):
    config = tiny.config()
    config.train.initial_weights = "hf://me/mine"
    assert pretrained.missing_weights(config) is None
    (hub.folder / "me/mine").mkdir(parents=True)
    (hub.folder / "me/mine/config.json").touch()
    assert pretrained.initial_weights(config) == hub.folder / "copies/me/mine"


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    sentence = r'^hf://me/mine needs the package huggingface_hub; install it with pip install "hpr_jax\[hub\]"\.$'
    for action in (lambda: open_source("hf://me/mine"), lambda: push(tmp_path, "hf://me/mine")):
        with pytest.raises(UserError, match=sentence):
            action()
    # It is told before anything is read.
    with pytest.raises(UserError, match=sentence):
        command_line.run(["convert", "--publish", str(tmp_path / "nothing"), "hf://me/mine"])


@pytest.mark.parametrize("name", ["hf://", "hf://mine", "hf://a/b/c", "hf://a/b c", "hf:///b", "hf://a/b\n"])
def test_names_of_nothing(hub, name):
    with pytest.raises(UserError, match="names no repository of the Hugging Face hub; such names are like hf://owner/name"):
        pull(name)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RepositoryNotFoundError("404\nmore"), "there is no such repository, or it is private"),
        (GatedRepoError("403"), "its owner gives access to those who ask"),
        (OfflineModeIsEnabled("offline"), "the library is set not to use the network"),
        (HfHubHTTPError("403 Forbidden\nmore"), "the hub does not let you"),
        (ConnectionError("resolver\nmore"), "the hub cannot be reached"),
        (TimeoutError(), "the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("strange.\nmore"), "strange"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_goes_wrong_there_is_one_sentence(hub, tmp_path, error, sentence):
    hub.error = error
    for action, what in ((lambda: pull("hf://me/mine"), "read"), (lambda: push(tmp_path, "hf://me/mine"), "written")):
        with pytest.raises(UserError) as raised:
            action()
        assert str(raised.value).startswith(f"hf://me/mine cannot be {what}: {sentence}")
        assert str(raised.value).endswith(".")
        assert "\n" not in str(raised.value)


def test_repositories_without_a_detector(hub):
    (hub.folder / "me/mine").mkdir(parents=True)
    (hub.folder / "me/mine/pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"hf://me/mine has none of the files model\.safetensors, config\.json, README\.md"):
        open_source("hf://me/mine")


def test_places(tmp_path):
    assert place("hf://me/mine") == "hf://me/mine"
    assert place("~/x") == Path("~/x").expanduser()
    assert is_hub("hf://me/mine")
    assert not is_hub(Path("hf://me/mine"))
    assert local_path(tmp_path) == local_path(str(tmp_path)) == tmp_path
    assert len(FILES) == 3


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["--to-torch", "run", "hf://me/mine"], "such places go with --publish"),
        (["run", "hf://me/mine"], "such places go with --publish"),
        (["--publish", "--annotations", "a.json", "run", "x"], "--publish takes the classes from the source"),
        (["--annotations", "a.json", "hf://me/mine", "x"], "--annotations goes with --config"),
        (["--publish", "--to-torch", "run", "x"], "not allowed with argument"),
        (["--publish", "nowhere", "x"], "no checkpoint"),
    ],
)
def test_bad_commands_get_a_sentence(hub, command, sentence):
    with pytest.raises(UserError, match=sentence):
        command_line.run(["convert", *command])
