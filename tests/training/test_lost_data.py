"""Images that vanish while a run is at work: it waits for them, replaces them, or is saved and ends. It never goes wrong."""

import os
import shutil
import signal
import threading

import pytest
import tiny
from scripted_run import script
from workdirs import numbers

from hpr_jax.data.augmentation import views
from hpr_jax.data.build import load_dataset, load_training_data, make_plan, make_views
from hpr_jax.data.images import UnreachableError, read_annotated_image
from hpr_jax.data.loading import patience
from hpr_jax.data.loading.batches import EvaluationLoader, TrainLoader
from hpr_jax.data.loading.patience import Patience
from hpr_jax.errors import DataLostError, StoppedError
from hpr_jax.evaluation.evaluator import Evaluator
from hpr_jax.training import loop
from hpr_jax.training.loop import TrainingLoop
from hpr_jax.training.run import train

# More than are loaded ahead.
STEPS = 20


@pytest.fixture
def scripted(monkeypatch):
    return script(monkeypatch)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE", 0.02)
    monkeypatch.setattr(loop, "LOOK", 0.05)


@pytest.fixture
def data(tmp_path):
    return tiny.write_coco(tmp_path / "data")


def config(directory, **settings):
    made = tiny.config(directory)
    made.train.update(steps=STEPS, log_every=1, checkpoint_every=1000, evaluate_every=1000)
    made.data.update(settings)
    return made


def when_step_3_is_taken(monkeypatch, act):
    def hook(run, step, *_):
        if step == 2:
            act()

    monkeypatch.setattr(TrainingLoop, "watch_compilation", hook)


def later(seconds, act, *arguments):
    timer = threading.Timer(seconds, act, arguments)
    timer.daemon = True
    timer.start()


class TestAFolderThatComesBack:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_changes_nothing(self, scripted, data, tmp_path, monkeypatch, workers):
        train(config(data), tmp_path / "undisturbed")
        folder, elsewhere = data / "train2017", tmp_path / "elsewhere"

        def take_away():
            folder.rename(elsewhere)
            later(0.5, elsewhere.rename, folder)

        when_step_3_is_taken(monkeypatch, take_away)
        train(config(data, workers=workers), tmp_path / "disturbed")
        assert folder.is_dir()
        assert numbers(tmp_path / "disturbed") == numbers(tmp_path / "undisturbed")
        assert all(line.get("reports", 0) == 0 for line in numbers(tmp_path / "disturbed"))

    def test_long_waits_are_told(self, scripted, data, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(loop, "LONG_WAIT", 0.2)
        folder, elsewhere = data / "train2017", tmp_path / "elsewhere"

        def take_away():
            folder.rename(elsewhere)
            later(1.0, elsewhere.rename, folder)

        when_step_3_is_taken(monkeypatch, take_away)
        train(config(data), tmp_path / "run")
        told = [text for text in caplog.messages if "waiting for images" in text]
        # After 0.2, 0.4 and 0.8 seconds.
        assert 1 <= len(told) <= 3
        assert told[0].endswith(f"is {data} slow or gone?")


class TestAFolderThatIsGone:
    @pytest.mark.parametrize("how", [shutil.rmtree, lambda folder: [path.unlink() for path in folder.iterdir()]])
    @pytest.mark.parametrize("workers", [0, 1])
    def test_ends_a_run_that_is_saved(self, scripted, data, tmp_path, monkeypatch, how, workers):
        train(config(data), tmp_path / "undisturbed")
        folder, copy = data / "train2017", tmp_path / "copy"
        shutil.copytree(folder, copy)
        with monkeypatch.context() as patched:
            when_step_3_is_taken(patched, lambda: how(folder))
            sentence = rf"The folder {folder} (cannot be reached|is empty), for 0 s now .* Step \d+ is saved, and the same"
            with pytest.raises(DataLostError, match=sentence):
                train(config(data, patience=0.1, workers=workers), tmp_path / "run")
        assert len(numbers(tmp_path / "run")) < STEPS
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        train(config(data), tmp_path / "run")
        assert numbers(tmp_path / "run") == numbers(tmp_path / "undisturbed")

    def test_does_not_keep_a_run_from_being_stopped(self, scripted, data, tmp_path, monkeypatch):
        def take_away():
            shutil.rmtree(data / "train2017")
            later(0.5, os.kill, os.getpid(), signal.SIGTERM)

        when_step_3_is_taken(monkeypatch, take_away)
        with pytest.raises(StoppedError, match=r"Stopped by SIGTERM; step \d+ is saved"):
            train(config(data, patience=600.0), tmp_path / "run")

    def test_at_an_evaluation_does_not_end_the_training(self, scripted, data, tmp_path, monkeypatch, caplog):
        def lose(self, state):
            raise DataLostError("The folder cannot be reached.")

        monkeypatch.setattr("hpr_jax.training.run.Evaluator.run", lose)
        made = config(data)
        made.train.evaluate_every = 5
        with pytest.raises(DataLostError, match=r"cannot be reached\. Step 20 is saved, and the same command goes"):
            # Without an evaluation at the end there are no metrics to return, but the run is saved.
            train(made, tmp_path / "run")
        # The last one is not tried again, which would mean to wait once more.
        assert [text for text in caplog.messages if "not evaluated" in text] == [
            f"step {step} is not evaluated: The folder cannot be reached." for step in (5, 10, 15, 20)
        ]
        assert (tmp_path / "run/checkpoints/20").is_dir()


def test_single_files_are_replaced_and_some_of_the_reports_are_told(
    scripted,
    data,
    tmp_path,
    monkeypatch,
    caplog,
):
    monkeypatch.setattr(loop, "TOLD", 3)
    monkeypatch.setattr(loop, "EVERY", 5)
    when_step_3_is_taken(monkeypatch, lambda: [(data / f"train2017/{number}.jpg").unlink() for number in range(3)])
    train(config(data), tmp_path / "run")
    reports = numbers(tmp_path / "run")[-2]["reports"]
    assert reports > 10
    told = [text for text in caplog.messages if "such reports so far" in text]
    assert len(told) == 3 + reports // 5
    assert "one of 5 is told" in caplog.text


class TestLoaders:
    def test_evaluation(self, data):
        dataset = load_dataset(config(data).data, "val")
        loader = Evaluator(config(data), dataset, None).loader
        assert loader.patience.seconds == 600
        shutil.rmtree(data / "val2017")
        with pytest.raises(DataLostError, match=r"val2017 cannot be reached, for 0 s now \(config.data.patience\)"):
            EvaluationLoader(dataset, loader.plan, 2)[0]

    def test_pasted_objects(self, data, monkeypatch):
        """A view without pasted objects would be another one than planned."""
        made = config(data)
        made.augmentation.update(kind="lsj")
        made.augmentation.lsj.update(side=64)
        train_set, _ = load_training_data(made)
        make, seen = make_views(made, train_set), []

        def read_once(image, height, width):
            seen.append(image)
            if len(seen) > 1:
                raise UnreachableError("The folder x cannot be reached")
            return read_annotated_image(image, height, width)

        monkeypatch.setattr(views, "read_annotated_image", read_once)
        plan, lost = make_plan(made, train_set), 0
        for slot in plan[0].slots + plan[1].slots:
            seen.clear()
            try:
                make(slot)
            except UnreachableError:
                lost += 1
            else:
                # Nothing of another image was to be pasted.
                assert len(seen) == 1
        assert lost
        with pytest.raises(DataLostError, match="The folder x cannot be reached"):
            TrainLoader(plan, make, 8)[0]


def test_patience_ends_when_nobody_waits(monkeypatch):
    patient, pauses = Patience(600), []

    def read():
        raise UnreachableError("The folder x cannot be reached")

    def pause(seconds):
        pauses.append(seconds)
        patient.ended = len(pauses) == 2
        assert len(pauses) < 3

    monkeypatch.setattr(patience.time, "sleep", pause)
    with pytest.raises(DataLostError, match=r"The folder x cannot be reached, for 600 s now"):
        patient(read)
    assert len(pauses) == 2
