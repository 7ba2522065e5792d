"""Weights & Biases beside the files of a run, with a stand-in for its library."""

import sys
import types

import pytest

from hpr_jax.errors import UserError
from hpr_jax.training.metric_writer import MetricWriter
from hpr_jax.training.wandb_sink import ID_FILE, WandbSink, require_wandb


class Library(types.ModuleType):
    """Remembers what it is told; runs without an id get a new one."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished, self.failing = [], [], 0, None

    def init(self, **settings):
        self._fail("init")
        self.begun.append(settings)
        return types.SimpleNamespace(id=settings["id"] or f"new{len(self.begun)}", log=self.log, finish=self.finish)

    def log(self, numbers, step):
        self._fail("log")
        self.logged.append((step, numbers))

    def finish(self):
        self._fail("finish")
        self.finished += 1

    def _fail(self, what):
        if self.failing == what:
            raise ConnectionError(f"no network for {what}\nand more")


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_the_numbers_of_the_files_are_sent(library, tmp_path):
    sink = WandbSink("shapes", tmp_path, {"train": {"seed": 1}})
    with MetricWriter(tmp_path, sink=sink) as writer:
        writer.write(3, {"loss": 2.0})
    assert library.logged == [(3, {"loss": 2.0})]
    assert library.finished == 1
    (begun,) = library.begun
    assert (begun["project"], begun["config"], begun["name"]) == ("shapes", {"train": {"seed": 1}}, tmp_path.name)


def test_a_run_that_goes_on_continues_the_one_there(library, tmp_path):
    for _ in range(2):
        WandbSink("shapes", tmp_path, {}).close()
    assert [begun["id"] for begun in library.begun] == [None, "new1"]
    assert all(begun["resume"] == "allow" for begun in library.begun)
    assert (tmp_path / ID_FILE).read_text() == "new1\n"


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_what_goes_wrong_is_one_warning(library, tmp_path, caplog, what):
    library.failing = what
    sink = WandbSink("shapes", tmp_path, {})
    with MetricWriter(tmp_path, sink=sink) as writer:
        writer.write(1, {"loss": 2.0})
        writer.write(2, {"loss": 1.0})
    assert caplog.messages == [
        f"Weights & Biases gets no more numbers of this run: no network for {what}. The files of the run have them."
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_a_project_nothing_is_sent(library, tmp_path):
    sink = WandbSink("", tmp_path, {})
    sink.write(1, {"loss": 1.0})
    sink.close()
    assert library.begun == library.logged == []


def test_without_the_library_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_wandb("")
    with pytest.raises(UserError, match=r"config\.train\.wandb needs the package wandb; .*hpr_jax\[log\]"):
        require_wandb("shapes")


def test_the_library_itself_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is the extra log")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbSink("shapes", tmp_path, {"train": {"seed": 1}})
    sink.write(1, {"loss": 1.0})
    sink.close()
    assert (tmp_path / ID_FILE).exists()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
