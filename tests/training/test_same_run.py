"""A run that goes on must have its settings and its data in common with the one that began; what differs is named."""

import dataclasses
import json
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from folders import settings

from hpr_jax.config import to_plain
from hpr_jax.data.build import load_dataset
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.training.resume import check_same_everywhere, check_same_run, dependencies
from hpr_jax.training.state import TrainState, evaluation_variables, training_arrays
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.find_checkpoint import find_checkpoint

CONFIG = to_plain(tiny.config())
# Settings that may differ, since they change nothing of the result but its last bits.
FREE = {
    "data.patience",
    "compute.operations",
    "compute.remat",
    "data.directory",
    "data.threads",
    "data.workers",
    "optimizer.recipe_batch_size",
    "train.accumulation_steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.matching",
    "train.plots",
    "train.wandb",
}
CLASSES = Classes(("cup", "pen"), (2, 5))
RUN: dict[str, dict[str, Any]] = {
    "data": {"training split": "a", "validation split": "b"},
    "machine": {"devices": 1, "kind of device": "cpu", "processes": 1, "CPU cores": 2, "JAX": "0.10.2"},
}
FOUND = Meta(CONFIG, CLASSES, 3, {}, RUN)


def leaves(section, prefix=""):
    """Dotted keys of all settings."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, *(value[:1] or ["x"])]
    return value + ("x" if isinstance(value, str) else 1)


def changed(key, content=CONFIG):
    """A copy with another value at a dotted key, and both values."""
    content = json.loads(json.dumps(content))
    *path, last = key.split(".")
    place = content
    for part in path:
        place = place[part]
    before, place[last] = place[last], other(place[last])
    return content, before, place[last]


def now(**fields):
    return dataclasses.replace(FOUND, step=0, **fields)


class TestSettings:
    @pytest.mark.parametrize("key", [key for key in leaves(CONFIG) if key not in FREE])
    def test_each_is_refused_by_name(self, key):
        config, before, after = changed(key)
        with pytest.raises(UserError) as error:
            check_same_run(FOUND, now(config=config), accept_changes=False)
        assert f"differs in config.{key} ({before!r} and {after!r})" in str(error.value)
        assert ("another model" in str(error.value)) == key.startswith("model.")

    def test_all_sections_are_among_them(self):
        assert {key.partition(".")[0] for key in leaves(CONFIG)} == set(CONFIG)
        assert len(CONFIG) == 8

    @pytest.mark.parametrize("key", sorted(FREE))
    def test_some_may_change(self, key, caplog):
        config, before, after = changed(key)
        with caplog.at_level("INFO", "hpr_jax"):
            check_same_run(FOUND, now(config=config), accept_changes=False)
        assert caplog.messages == [f"Goes on with another setting: config.{key} ({before!r} and {after!r})."]

    def test_one_that_is_new_is_refused(self):
        config = json.loads(json.dumps(CONFIG))
        config["augmentation"]["mosaic"] = 0.5
        with pytest.raises(UserError, match=r"differs in config\.augmentation\.mosaic \(None and 0\.5\)"):
            check_same_run(FOUND, now(config=config), accept_changes=False)

    def test_several_are_named_together(self):
        config, _, _ = changed("optimizer.gamma")
        config, _, _ = changed("loss.branch_weight", config)
        with pytest.raises(UserError, match=r"config\.optimizer\.gamma .*, config\.loss\.branch_weight .*--accept-changes"):
            check_same_run(FOUND, now(config=config), accept_changes=False)

    def test_accepted_changes_are_said_one_by_one(self, caplog):
        config, _, _ = changed("optimizer.gamma")
        run = {**RUN, "data": {**RUN["data"], "validation split": "c"}}
        check_same_run(FOUND, now(config=config, run=run), accept_changes=True)
        assert caplog.messages == [
            "Goes on with another setting than the run began with: config.optimizer.gamma (0.1 and 1.1).",
            "Goes on with another setting than the run began with: the validation split of the data set.",
        ]

    def test_another_model_is_never_accepted(self):
        config, _, _ = changed("model.hidden")
        with pytest.raises(UserError, match=r"another model, which differs in config\.model\.hidden"):
            check_same_run(FOUND, now(config=config), accept_changes=True)

    def test_the_same_says_nothing(self, caplog):
        with caplog.at_level("INFO", "hpr_jax"):
            check_same_run(FOUND, now(), accept_changes=False)
        assert not caplog.messages


class TestData:
    @pytest.mark.parametrize("split", ["training split", "validation split"])
    def test_each_split_is_refused_by_name(self, split):
        run = {**RUN, "data": {**RUN["data"], split: "other"}}
        with pytest.raises(UserError, match=rf"differs in the {split} of the data set\."):
            check_same_run(FOUND, now(run=run), accept_changes=False)

    @pytest.mark.parametrize(
        "classes",
        [Classes(("cup", "mug"), (2, 5)), Classes(("cup", "pen"), (2, 6)), Classes(("pen", "cup"), (5, 2))],
        ids=["name", "id", "order"],
    )
    def test_other_classes_are_never_accepted(self, classes):
        for accept_changes in (False, True):
            with pytest.raises(UserError, match="differs in the classes of the data set"):
                check_same_run(FOUND, now(classes=classes), accept_changes)

    @pytest.mark.parametrize(("split", "name"), [("train", "training split"), ("val", "validation split")])
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"bbox": [0, 0, 60, 48]', '"bbox": [0, 0, 60, 47]'),
            ('"id": 17', '"id": 18'),
            ('"2.jpg"', '"3.jpg"'),
            ('"hat"', '"cap"'),
            ('"iscrowd": 1', '"iscrowd": 0'),
        ],
    )
    def test_each_annotation_file_counts(self, coco, tmp_path, split, name, old, new):
        shutil.copytree(coco / "annotations", tmp_path / "annotations")
        for images in ("train2017", "val2017"):
            (tmp_path / images).mkdir()
        path = tmp_path / f"annotations/instances_{split}2017.json"
        text = path.read_text()
        assert old in text
        # The image 17 has no annotations.
        path.write_text(text.replace(old, new))
        before, after = (
            dependencies(*(load_dataset(settings(directory), some) for some in ("train", "val")))["data"]
            for directory in (coco, tmp_path)
        )
        assert before.keys() == after.keys() == {"training split", "validation split"}
        assert [key for key in before if before[key] != after[key]] == [name]


class TestMachine:
    @pytest.mark.parametrize("key", sorted(RUN["machine"]))
    def test_each_difference_is_said_by_name(self, key, caplog):
        machine, before, after = changed(key, RUN["machine"])
        check_same_run(FOUND, now(run={**RUN, "machine": machine}), accept_changes=False)
        (message,) = caplog.messages
        assert message.startswith(f"Goes on elsewhere: {key} ({before!r} and {after!r}).")

    def test_is_what_jax_says(self, monkeypatch):
        monkeypatch.setattr(jax, "device_count", lambda: 64)
        monkeypatch.setattr(jax, "process_count", lambda: 8)
        monkeypatch.setattr(jax, "__version__", "1.2.3")
        data: Any = types.SimpleNamespace(fingerprint="x")
        machine = dependencies(data, data)["machine"]
        assert machine.keys() == RUN["machine"].keys()
        assert (machine["devices"], machine["processes"], machine["JAX"]) == (64, 8, "1.2.3")
        assert machine["kind of device"] == jax.devices()[0].device_kind
        assert json.loads(json.dumps(machine)) == machine


class TestProcesses:
    """All processes must be about to do the same; else none begins."""

    def check(self, monkeypatch, meta):
        def gather(value):
            mine = [FOUND.config, list(FOUND.classes.names), FOUND.run["data"]]
            assert value == mine
            return [mine, mine, [meta.config, list(meta.classes.names), meta.run["data"]]]

        monkeypatch.setattr("hpr_jax.training.resume.gather", gather)
        check_same_everywhere(FOUND)

    def test_the_same(self, monkeypatch):
        self.check(monkeypatch, FOUND)

    @pytest.mark.parametrize("key", ["model.hidden", "augmentation.flip", "data.directory", "evaluate.side", "train.seed"])
    def test_other_settings(self, monkeypatch, key):
        with pytest.raises(UserError, match=rf"Process 2 differs from process 0 in config\.{key} "):
            self.check(monkeypatch, now(config=changed(key)[0]))

    @pytest.mark.parametrize("split", ["training split", "validation split"])
    def test_other_data(self, monkeypatch, split):
        run = {**RUN, "data": {**RUN["data"], split: "other"}}
        with pytest.raises(UserError, match="Process 2 differs from process 0 in the data set"):
            self.check(monkeypatch, now(run=run))

    def test_other_classes(self, monkeypatch):
        with pytest.raises(UserError, match="Process 2 differs from process 0 in the data set"):
            self.check(monkeypatch, now(classes=Classes(("cup", "mug"), (2, 5))))


class TestStates:
    def state(self, *, averaged):
        params = nnx.State({"kernel": nnx.Param(np.float32(1))})
        average = nnx.State({"kernel": nnx.Param(np.float32(2))}) if averaged else None
        frozen = nnx.State({"mean": nnx.Variable(np.float32(3))})
        return TrainState(jnp.int32(7), params, frozen, {"moments": np.float32(4)}, average)

    @pytest.mark.parametrize(("averaged", "kernel"), [(False, 1), (True, 2)])
    def test_the_average_is_what_is_evaluated_and_saved(self, averaged, kernel):
        found = nnx.to_pure_dict(evaluation_variables(self.state(averaged=averaged)))
        assert found == {"kernel": kernel, "mean": 3}

    def test_a_run_goes_on_from_the_parameters_moments_and_step(self):
        assert training_arrays(self.state(averaged=False)) == {"optimizer": {"moments": 4}, "step": 7}
        assert training_arrays(self.state(averaged=True)) == {
            "optimizer": {"moments": 4},
            "step": 7,
            "params": {"kernel": 1},
        }


class TestWhichCheckpointIsTaken:
    def folder(self, path, *names):
        for name in names:
            for item in ("model", "meta"):
                (path / name / item).mkdir(parents=True)

    def test_the_best_of_a_workdir(self, tmp_path):
        self.folder(tmp_path, "checkpoints/9", "checkpoints/100", "best/3")
        assert find_checkpoint(tmp_path) == tmp_path / "best/3"
        assert find_checkpoint(tmp_path / "checkpoints/9") == tmp_path / "checkpoints/9"

    def test_else_the_newest_by_number(self, tmp_path):
        self.folder(tmp_path, "checkpoints/9", "checkpoints/100", "checkpoints/20", "checkpoints/200.damaged")
        for path in (tmp_path, tmp_path / "checkpoints"):
            assert find_checkpoint(path) == tmp_path / "checkpoints/100"
