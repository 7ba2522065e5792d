"""What the training loop gives to steps and to evaluation, and what it writes.

Steps and precisions are scripted. There is no detector: a state is a single parameter, which counts the steps.
"""

import json
import os
import re
import signal
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import tiny
from flax import nnx
from scripted_run import script
from workdirs import events, lines

import hpr_jax
from hpr_jax.errors import StoppedError, UserError
from hpr_jax.runtime.devices import data_mesh
from hpr_jax.runtime.logs import log_to_console
from hpr_jax.training import run
from hpr_jax.training.callbacks import Callback
from hpr_jax.training.run import train
from hpr_jax.training.state import initial_state
from hpr_jax.training.workdir_lock import owned
from hpr_jax.weights.checkpoint import read_meta

SCHEDULE = {"learning_rate": 1.0, "warmup_steps": 5, "warmup_factor": 0.5, "milestones": (3,), "gamma": 0.1}
RATES = (0.5, 0.625, 0.75, 0.0875)


@pytest.fixture
def scripted(monkeypatch):
    return script(monkeypatch)


def settings(coco, **others):
    config = tiny.config(coco)
    config.optimizer.update(SCHEDULE)
    config.train.update(steps=4, log_every=1, checkpoint_every=100, evaluate_every=100)
    config.train.update(others)
    return config


def stored(checkpoint):
    """The arrays of a checkpoint."""
    items = {name: ocp.args.StandardRestore() for name in ("model", "training") if (checkpoint / name).is_dir()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(checkpoint.resolve(), args=ocp.args.Composite(**items))


class TestLearningRates:
    def test_steps_take_the_rates_that_are_logged(self, scripted, coco, tmp_path):
        train(settings(coco), tmp_path)
        assert scripted.rates == pytest.approx(RATES)
        assert [line["learning_rate"] for line in lines(tmp_path) if "loss" in line] == pytest.approx(RATES)

    def test_a_run_that_goes_on_takes_the_next_ones(self, scripted, coco, tmp_path):
        for steps in (2, 4):
            train(settings(coco, steps=steps), tmp_path, accept_changes=True)
        assert scripted.rates == pytest.approx(RATES)
        assert [line["learning_rate"] for line in lines(tmp_path) if "loss" in line] == pytest.approx(RATES)


class TestWhatIsWritten:
    def test_numbers_are_those_of_their_steps(self, scripted, coco, tmp_path):
        """The loss is the mean since the last line."""
        train(settings(coco, steps=6, log_every=3), tmp_path)
        found = [line for line in lines(tmp_path) if "loss" in line]
        assert [(line["step"], line["loss"]) for line in found] == [(1, 1.0), (3, 2.5), (6, 5.0)]
        assert [line["gradient_norm"] for line in found] == [10, 30, 60]
        assert [line["term/layer_0/class"] for line in found] == [100, 300, 600]
        assert [line["compilations"] for line in found] == [10] * 3
        assert all(line["images_per_second"] > 0 and line["data_wait"] >= 0 for line in found)
        names = {
            "step",
            "loss",
            "learning_rate",
            "gradient_norm",
            "images_per_second",
            "data_wait",
            "compilations",
            "reports",
        }
        assert all(line.keys() == names | {"term/layer_0/class"} for line in found)

    def test_reports_are_counted(self, scripted, coco, tmp_path, caplog):
        """Each image has two boxes or none, and there is room for one."""
        config = settings(coco, steps=3)
        config.data.max_boxes = 1
        train(config, tmp_path)
        said = [message for message in caplog.messages if "has 2 boxes, the batch has room for 1" in message]
        assert len(said) == [line["reports"] for line in lines(tmp_path) if "loss" in line][-1] > 0
        assert said[-1].endswith(f"({len(said)} such reports so far)")

    def test_precisions_are_written_under_their_names(self, scripted, coco, tmp_path, caplog):
        scripted.precisions = iter([0.25, 0.375])
        with caplog.at_level("INFO", "hpr_jax"):
            metrics = train(settings(coco, evaluate_every=2), tmp_path)
        assert [line for line in lines(tmp_path) if "val/AP" in line] == [
            {"step": 2, "val/AP": 0.25, "val/AP50": 0.75},
            {"step": 4, "val/AP": 0.375, "val/AP50": 0.625},
        ]
        assert metrics == {"AP": 0.375, "AP50": 0.625}
        assert "step 2: AP 0.2500, AP50 0.7500" in caplog.messages
        assert len(scripted.evaluated_on) == 3

    def test_a_signal_in_the_last_step_comes_too_late(self, scripted, coco, tmp_path, monkeypatch):
        def interrupt(loop, step, *_):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(run.TrainingLoop, "watch_compilation", interrupt)
        assert train(settings(coco), tmp_path)["AP"] == 0.5
        assert (tmp_path / "checkpoints/4").is_dir()

    def test_a_workdir_has_one_run_at_a_time(self, scripted, coco, tmp_path):
        with owned(tmp_path / "run"), pytest.raises(UserError, match="belongs to a run that is at work"):
            train(settings(coco, steps=2), tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["owner"]
        train(settings(coco, steps=2), tmp_path / "run")

    def test_checkpoints_come_at_their_steps(self, scripted, coco, tmp_path):
        train(settings(coco, steps=7, checkpoint_every=2, keep_checkpoints=3), tmp_path)
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6", "7"]
        for step in (4, 6, 7):
            content, meta = stored(tmp_path / f"checkpoints/{step}"), read_meta(tmp_path / f"checkpoints/{step}")
            assert content.model["count"].tolist() == [step] * 2
            assert content.model["frozen"].tolist() == [1, 1]
            assert content.training["step"] == meta.step == step
            assert meta.classes.category_ids == (2, 5, 9)
            assert meta.config["train"]["steps"] == 7


class TestWhereItIsWritten:
    def test_ap_by_class_goes_to_tensorboard_alone(self, scripted, coco, tmp_path):
        scripted.precisions = iter([0.25, 0.375])
        train(settings(coco, evaluate_every=2), tmp_path)
        found = [event for event in events(tmp_path) if event[1].startswith("val/")]
        assert found == [
            (2, "val/AP", 0.25),
            (2, "val/AP50", 0.75),
            (2, "val/class/cup/AP", 0.25),
            (4, "val/AP", 0.375),
            (4, "val/AP50", 0.625),
            (4, "val/class/cup/AP", 0.375),
        ]
        assert not any(name.startswith("val/class") for line in lines(tmp_path) for name in line)

    @pytest.mark.usefixtures("restored_log")
    @pytest.mark.parametrize("terminal", [False, True])
    def test_the_loss_goes_to_the_log_file_and_rarely_to_the_console(
        self, scripted, coco, tmp_path, monkeypatch, capsys, terminal
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        log_to_console()
        train(settings(coco), tmp_path)
        losses = [f"step {step} of 4: loss {step}.000, learning rate 0." for step in (1, 2, 3, 4)]
        written = (tmp_path / "train.log").read_text()
        found = re.findall(r"^\d{4}-\d\d-\d\d .* INFO (step \d of .* 0\.)\d+, .* images/s", written, re.MULTILINE)
        assert found == losses
        printed = capsys.readouterr().out
        assert [line for line in losses if line in printed] == ([] if terminal else losses[:1])
        for text in (written, printed):
            assert "step 4: AP 0.5000, AP50 0.5000" in text


class TestWhatIsEvaluated:
    @pytest.mark.parametrize(("decay", "sign"), [(0.0, 1), (0.9, -1)])
    def test_the_average_where_there_is_one(self, scripted, coco, tmp_path, decay, sign):
        """It is evaluated, saved as the best, and the detector of a checkpoint; training goes on from the parameters."""
        scripted.precisions = iter([0.25, 0.5])
        train(settings(coco, evaluate_every=2, ema_decay=decay), tmp_path)
        assert scripted.evaluated == [2 * sign, 4 * sign]
        assert stored(tmp_path / "best/4").model["count"].tolist() == [4 * sign] * 2
        content = stored(tmp_path / "checkpoints/4")
        assert content.model["count"].tolist() == [4 * sign] * 2
        assert "params" not in content.training if sign > 0 else content.training["params"]["count"].tolist() == [4, 4]

    def test_a_run_that_is_over_is_evaluated_once_more(self, scripted, coco, tmp_path):
        for _ in range(2):
            train(settings(coco, ema_decay=0.9), tmp_path)
        assert scripted.evaluated == [-4, -4]


class TestTheBest:
    def best(self, tmp_path):
        (path,) = (tmp_path / "best").iterdir()
        meta = read_meta(path)
        assert stored(path).model["count"].tolist() == [meta.step] * 2
        return path.name, meta.step, meta.metrics["AP"]

    def test_is_that_of_the_highest_ap(self, scripted, coco, tmp_path):
        """The last evaluation does not decide, nor does another metric; of equal ones the first stays the best."""
        scripted.precisions = iter([0.25, 0.75, 0.75, 0.5])
        train(settings(coco, evaluate_every=1), tmp_path)
        assert self.best(tmp_path) == ("2", 2, 0.75)

    @pytest.mark.parametrize(("precision", "expected"), [(0.5, ("2", 2, 0.75)), (0.875, ("4", 4, 0.875))])
    def test_is_known_to_a_run_that_goes_on(self, scripted, coco, tmp_path, precision, expected):
        scripted.precisions = iter([0.75, precision])
        for steps in (2, 4):
            train(settings(coco, steps=steps), tmp_path, accept_changes=True)
        assert self.best(tmp_path) == expected


class TestSettingsReachTheirParts:
    def test_of_the_step(self, scripted, coco, tmp_path):
        config = settings(coco, seed=5, ema_decay=0.75, accumulation_steps=2, matching="scipy")
        config.optimizer.update(clip_norm=0.5, weight_decay=0.25, backbone_multiplier=0.125)
        train(config, tmp_path)
        ((_, criterion, optimizer, seed, decay, parts, mesh, matching),) = scripted.settings
        assert (seed, decay, parts, mesh.size, matching) == (5, 0.75, 2, jax.device_count(), "scipy")
        assert (optimizer.clip_norm, optimizer.weight_decay, optimizer.backbone_multiplier) == (0.5, 0.25, 0.125)
        assert dict(criterion.branch_weights).keys() == {"regional_attention", "dynamic_conv"}

    def test_of_the_loader(self, scripted, coco, tmp_path, monkeypatch):
        found = []

        def batches(loader, start, stop, threads, workers):
            found.append((loader, start, stop, threads, workers))
            return types.SimpleNamespace(__next__=None, close=lambda: None)

        config = settings(coco, steps=2)
        train(config, tmp_path)
        config.data.update(threads=3, workers=2)
        monkeypatch.setattr("hpr_jax.training.run.train_batches", batches)
        train(config, tmp_path)
        ((loader, *others),) = found
        assert others == [2, 2, 3, 2]
        assert loader.max_boxes == 4
        assert (loader.plan.batch_size, loader.plan.seed) == (2, 0)
        assert loader.places == slice(0, 2)

    def test_of_what_a_checkpoint_says_of_its_run(self, scripted, coco, tmp_path):
        train(settings(coco, steps=0, epochs=1, evaluate_every=1, seed=3), tmp_path)
        meta = read_meta(tmp_path / "checkpoints/3")
        # Six images in batches of two.
        assert (meta.config["train"]["steps"], meta.config["train"]["epochs"]) == (3, 0)
        assert meta.config["optimizer"]["milestones"] == [9]
        assert meta.config["train"]["seed"] == 3
        assert meta.run["progress"] == {"losses": [], "reports": 0, "reference": 0.5, "stale": 0}
        assert json.loads(json.dumps(meta.run)) == meta.run
        assert meta.run["data"].keys() == {"training split", "validation split"}


class Module(nnx.Module):
    """Takes the place of a detector."""

    def __init__(self):
        self.trained, self.frozen = nnx.Param(jnp.arange(3.0)), nnx.Variable(jnp.ones(2))


class TestInitialStates:
    def made(self, monkeypatch, weights=None, **settings):
        """The detector's structure, the state, and what the detector was made of."""
        calls = []

        def random_detector(model, num_classes, *, compute, seed):
            calls.append((model.channels, num_classes, compute.dtype, seed))
            return Module()

        monkeypatch.setattr("hpr_jax.training.state.random_detector", random_detector)
        monkeypatch.setattr("hpr_jax.training.state.load_initial_weights", lambda detector, path: calls.append(path))
        config = tiny.config()
        config.train.update(settings)
        graph, state = initial_state(config, 7, data_mesh(jax.devices()[:1]), weights)
        return graph, state, calls

    def test_the_average_begins_as_a_copy_of_the_parameters(self, monkeypatch):
        _, state, _ = self.made(monkeypatch, ema_decay=0.9)
        trained, average = state.params["trained"], state.average["trained"]
        assert trained[...].tolist() == average[...].tolist() == [0, 1, 2]
        # They share no memory, since a step donates both.
        assert trained[...].unsafe_buffer_pointer() != average[...].unsafe_buffer_pointer()
        assert nnx.to_pure_dict(state.frozen)["frozen"].tolist() == [1, 1]
        assert int(state.step) == 0
        assert self.made(monkeypatch)[1].average is None

    def test_is_that_of_the_config(self, monkeypatch):
        graph, state, calls = self.made(monkeypatch, seed=5)
        assert calls == [(16, 7, "float32", 5)]
        assert isinstance(nnx.merge(graph, state.params, state.frozen), Module)
        moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.size == 3]
        assert [moment.tolist() for moment in moments] == [[0, 0, 0]] * 2

    @pytest.mark.parametrize(("left", "begins"), [("", True), ("2.partial", True), ("2", False), ("2.damaged", False)])
    def test_initial_weights_are_for_runs_that_have_saved_nothing(self, coco, tmp_path, monkeypatch, left, begins):
        """What a run that was killed while it saved has left counts as nothing."""
        (tmp_path / "run/checkpoints" / left).mkdir(parents=True)
        (tmp_path / "weights.npz").write_bytes(b"")
        given = []

        def begin(config, num_classes, mesh, weights):
            given.append(weights)
            raise StoppedError("It has begun.", 130)

        monkeypatch.setattr(run, "initial_state", begin)
        with pytest.raises(StoppedError):
            train(settings(coco, initial_weights=str(tmp_path / "weights.npz")), tmp_path / "run")
        assert given == [tmp_path / "weights.npz" if begins else None]

    def test_initial_weights_are_those_of_the_given_file(self, monkeypatch):
        *_, calls = self.made(monkeypatch, weights=Path("weights.pth"))
        assert calls[1:] == [Path("weights.pth")]


def test_an_average_that_is_switched_on_is_a_copy(scripted, coco, tmp_path, monkeypatch):
    """A step overwrites both the parameters and their average."""
    train(settings(coco, steps=2), tmp_path)
    seen, resume = [], run.resume
    monkeypatch.setattr(run, "resume", lambda *arguments: seen.append(resume(*arguments)) or seen[-1])
    train(settings(coco, steps=4, ema_decay=0.5), tmp_path, accept_changes=True)
    ((state, _),) = seen
    (parameter,), (average,) = (jax.tree.leaves(tree) for tree in (state.params, state.average))
    assert parameter is not average
    # On a CPU, arrays may be one although they are two objects.
    pointers = {array.addressable_data(0).unsafe_buffer_pointer() for array in (parameter, average)}
    assert len(pointers) == 2


def best(workdir):
    """What the best checkpoint, the only one in its folder, says of itself."""
    (folder,) = (workdir / "best").iterdir()
    return read_meta(folder)


def evaluated_steps(workdir):
    return [line["step"] for line in lines(workdir) if "val/AP" in line]


class TestEarlyStopping:
    PRECISIONS = (0.1, 0.3, 0.304, 0.302, 0.306, 0.304, 0.9)

    def test_ends_when_evaluations_have_not_gained_together(self, scripted, coco, tmp_path, caplog):
        """0.306 is no more than min_gain above 0.3, although no two evaluations in a row are."""
        scripted.precisions = iter(self.PRECISIONS)
        with caplog.at_level("INFO", "hpr_jax"):
            metrics = train(settings(coco, steps=90, evaluate_every=3, patience=3, min_gain=0.007), tmp_path)
        assert evaluated_steps(tmp_path) == [3, 6, 9, 12, 15]
        assert metrics["AP"] == 0.306
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["15"]
        assert best(tmp_path).metrics["AP"] == 0.306
        said = "The run ends early, at step 15 of 90: 3 evaluations in a row have gained no more than 0.007 in AP."
        assert said in caplog.messages

    def test_a_gain_renews_the_patience(self, scripted, coco, tmp_path):
        scripted.precisions = iter(self.PRECISIONS)
        train(settings(coco, steps=21, evaluate_every=3, patience=3, min_gain=0.005), tmp_path)
        assert evaluated_steps(tmp_path) == [3, 6, 9, 12, 15, 18, 21]

    def test_without_patience_it_goes_on(self, scripted, coco, tmp_path):
        train(settings(coco, steps=30, evaluate_every=3), tmp_path)
        assert evaluated_steps(tmp_path) == list(range(3, 31, 3))

    def test_a_run_that_goes_on_remembers(self, scripted, coco, tmp_path):
        scripted.precisions = iter((0.5, 0.4, 0.4, 0.4))
        config = settings(coco, steps=90, evaluate_every=3, checkpoint_every=7, patience=3)
        with pytest.MonkeyPatch.context() as context:

            def interrupt(loop, step, *_):
                if step == 7:
                    os.kill(os.getpid(), signal.SIGTERM)

            context.setattr(run.TrainingLoop, "watch_compilation", interrupt)
            with pytest.raises(StoppedError):
                train(config, tmp_path)
        train(config, tmp_path)
        assert evaluated_steps(tmp_path) == [3, 6, 9, 12]

    def test_a_run_that_has_ended_early_is_done(self, scripted, coco, tmp_path):
        config = settings(coco, steps=90, evaluate_every=3, patience=3)
        train(config, tmp_path)
        taken = len(scripted.rates)
        assert train(config, tmp_path)["AP"] == 0.5
        assert len(scripted.rates) == taken == 12

    def test_more_patience_lets_it_go_on(self, scripted, coco, tmp_path):
        train(settings(coco, steps=90, evaluate_every=3, patience=2), tmp_path)
        train(settings(coco, steps=90, evaluate_every=3, patience=4), tmp_path, accept_changes=True)
        assert evaluated_steps(tmp_path) == [3, 6, 9, 12, 15]

    def test_the_best_checkpoint_is_of_the_chosen_metric(self, scripted, coco, tmp_path):
        """AP50 falls where AP rises."""
        scripted.precisions = iter((0.5, 0.3, 0.7))
        train(settings(coco, steps=9, evaluate_every=3, best_metric="AP50"), tmp_path)
        assert best(tmp_path).step == 6

    def test_a_metric_of_nothing_is_told(self, scripted, coco, tmp_path, caplog):
        train(settings(coco, steps=3, evaluate_every=3, best_metric="AP_large"), tmp_path)
        assert "step 3: the validation images have no objects for AP_large." in caplog.messages


class Listener(Callback):
    """Remembers what it hears, and ends the run behind a step or evaluation."""

    def __init__(self, end_step=None, end_evaluation=None):
        self.heard, self.end_step, self.end_evaluation = [], end_step, end_evaluation

    def on_step(self, step, numbers):
        self.heard.append(("step", step, numbers["loss"]))
        return step == self.end_step

    def on_evaluation(self, step, result):
        self.heard.append(("evaluation", step, result.metrics["AP"]))
        return step == self.end_evaluation

    def on_checkpoint(self, step, workdir):
        self.heard.append(("checkpoint", step, workdir.name))


class TestCallbacks:
    def test_they_hear_of_everything_in_order(self, scripted, coco, tmp_path):
        listener = Listener()
        train(settings(coco, steps=4, evaluate_every=2, checkpoint_every=3), tmp_path, callbacks=[listener])
        name = tmp_path.name
        assert listener.heard == [
            *[("step", 1, 1.0), ("step", 2, 2.0), ("evaluation", 2, 0.5)],
            *[("step", 3, 3.0), ("checkpoint", 3, name)],
            *[("step", 4, 4.0), ("evaluation", 4, 0.5), ("checkpoint", 4, name)],
        ]

    def test_a_step_can_end_the_run_which_then_goes_on(self, scripted, coco, tmp_path):
        """The numbers of a step come when the next one runs, unless the log reads them before."""
        config = settings(coco, steps=9, log_every=100)
        assert train(config, tmp_path, callbacks=[Listener(), Listener(end_step=3)])["AP"] == 0.5
        (last,) = (tmp_path / "checkpoints").iterdir()
        assert last.name == "4"
        train(config, tmp_path)
        assert len(scripted.rates) == 9

    def test_an_evaluation_can_end_the_run(self, scripted, coco, tmp_path, caplog):
        with caplog.at_level("INFO", "hpr_jax"):
            train(settings(coco, steps=9, evaluate_every=2), tmp_path, callbacks=[Listener(end_evaluation=4)])
        assert "A callback ends the run behind step 4 of 9." in caplog.messages
        assert evaluated_steps(tmp_path) == [2, 4]

    def test_training_from_python(self, scripted, coco, tmp_path):
        listener = Listener()
        steps = {"train.steps": 3, "train.epochs": 0, "train.log_every": 1}
        config = settings(coco)
        result = hpr_jax.train(config, workdir=tmp_path / "run", overrides=steps, callbacks=[listener])
        assert (result.workdir, result.metrics["AP"]) == (tmp_path / "run", 0.5)
        assert [step for kind, step, _ in listener.heard if kind == "step"] == [1, 2, 3]
        assert config.train.steps == 4, "the config of the caller stays as it is"

    def test_wrong_settings_from_python(self, coco, tmp_path):
        with pytest.raises(UserError, match=r"There is no setting config\.train\.step"):
            hpr_jax.train(settings(coco), workdir=tmp_path / "run", overrides={"train.step": 3})
        with pytest.raises(UserError, match="nowhere"):
            hpr_jax.train("ddq.py:demo", data=tmp_path / "nowhere", workdir=tmp_path / "run")
        assert not (tmp_path / "run").exists()
