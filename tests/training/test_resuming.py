"""Runs that were stopped, killed, damaged or moved go on, and end as one that was left alone, or are refused."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from check_resume import differences, read_run
from workdirs import lines, numbers, weights

from hpr_jax.errors import RunError, StoppedError, UserError
from hpr_jax.training.loop import TrainingLoop
from hpr_jax.training.run import train
from hpr_jax.weights import checkpoint_writer
from hpr_jax.weights.checkpoint import load_detector
from hpr_jax.weights.find_checkpoint import find_checkpoint


def test_resuming_gives_the_weights_of_a_run_without_stop(trained, coco, tmp_path):
    config = tiny.config(coco)
    config.train.steps = 2
    train(config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2"]
    config.train.steps = 4
    with pytest.raises(UserError, match=r"differs in config.train.steps \(2 and 4\)\. .*--accept-changes"):
        train(config, tmp_path)
    train(config, tmp_path, accept_changes=True)
    one, two = weights(trained[0] / "checkpoints"), weights(tmp_path / "checkpoints")
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_sigterm_saves_and_the_same_command_goes_on(trained, coco, tmp_path, monkeypatch):
    """The signal comes between two lines of the log: the mean loss of the second is that of a run without a stop, too."""

    def terminate(run, step, *_):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "watch_compilation", terminate)
        with pytest.raises(StoppedError, match=r"Stopped by SIGTERM; step 3 is saved") as stopped:
            train(tiny.config(coco), tmp_path)
    assert stopped.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    train(tiny.config(coco), tmp_path)
    # The last two checkpoints are of the steps 3 and 4 here, and of 2 and 4 there.
    different = differences(read_run(tmp_path), read_run(trained[0]))
    assert all(name.startswith(("names in checkpoints", "checkpoints/2:", "checkpoints/3:")) for name in different)


@pytest.fixture(scope="module")
def alone(coco, tmp_path_factory):
    """The workdir of a run of `tiny.small` that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("alone")
    train(tiny.small(coco), workdir)
    return workdir


@pytest.mark.slow
def test_kills_do_not_change_the_end(alone, coco, tmp_path):
    """SIGKILL comes three times, once while a checkpoint is written."""
    config = tiny.write_config(tmp_path / "tiny_config.py", coco, function="small")
    command = [sys.executable, str(tiny.ROOT / "scripts/check_resume.py"), "--kills", "3", "--config", str(config)]
    # With this seed the kills come before a run of so many seconds ends.
    command += ["--seconds", "12", "--seed", "75"]
    command += ["--workdir", str(tmp_path / "runs"), "--reference", str(alone)]
    done = subprocess.run(command, env=tiny.process_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 kills" in done.stdout


def flip_byte(checkpoint):
    """Changes one bit in the middle of the largest file."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(trained, coco, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    (workdir / "checkpoints/6.partial/model").mkdir(parents=True)
    flip_byte(workdir / "checkpoints/4")
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged: \w+/.* has changed since it was written"):
        load_detector(workdir / "checkpoints/4")
    with caplog.at_level("INFO", "hpr_jax"):
        train(tiny.config(coco), workdir)
    assert [text for text in caplog.messages if "damaged" in text or "Goes on" in text] == [
        f"The checkpoint {workdir}/checkpoints/4 is damaged ("
        + caplog.text.partition("is damaged (")[2].partition(")")[0]
        + "): it is now 4.damaged, and not used.",
        "Goes on from step 2.",
    ]
    shutil.rmtree(workdir / "checkpoints/4.damaged")
    assert differences(read_run(workdir), read_run(trained[0])) == []
    for step in (2, 4):
        flip_byte(workdir / f"checkpoints/{step}")
    # Twice: the second start, which finds no checkpoint under its name, does not begin anew either.
    for _ in range(2):
        with pytest.raises(UserError, match=r"All checkpoints in .* are damaged: 2.damaged, 4.damaged"):
            train(tiny.config(coco), workdir)
    assert len(lines(workdir)) == 4


def fails_at_once(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing \"model\": No space left on device [os_error_code='28']")


def fails_at_last(folder):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


@pytest.mark.parametrize(
    ("owner", "name", "fails"),
    [(ocp.Checkpointer, "save", fails_at_once), (checkpoint_writer, "write_manifest", fails_at_last)],
)
def test_a_full_disk_leaves_earlier_checkpoints_intact(trained, coco, tmp_path, monkeypatch, owner, name, fails):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    shutil.rmtree(workdir / "checkpoints/4")
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fails)
        sentence = r"checkpoints/4 cannot be written: no space is left on the device. Earlier checkpoints are as they were"
        with pytest.raises(RunError, match=sentence):
            train(tiny.config(coco), workdir)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]


def test_other_data_is_refused(trained, coco, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(coco, other)
    path = other / "annotations/instances_train2017.json"
    path.write_text(path.read_text().replace("[10, 10, 0, 5]", "[10, 10, 9, 5]"))
    with pytest.raises(UserError, match="differs in the training split of the data set"):
        train(tiny.config(other), trained[0])


def test_a_workdir_of_another_model_is_refused(trained, coco):
    config = tiny.config(coco)
    config.model.hidden = 32
    with pytest.raises(UserError, match=r"config.model.hidden \(24 and 32\)"):
        train(config, trained[0])


def test_a_best_checkpoint_alone_is_of_a_run_too(trained, coco, tmp_path):
    shutil.copytree(trained[0] / "best", tmp_path / "best")
    config = tiny.config(coco)
    config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"differs in config\.optimizer\.learning_rate"):
        train(config, tmp_path)


@pytest.mark.slow
def test_a_moving_average_is_what_is_evaluated(trained, coco, tmp_path):
    config = tiny.config(coco)
    config.train.ema_decay = 0.9
    train(config, tmp_path / "whole")
    config.train.steps = 2
    train(config, tmp_path / "parts")
    config.train.steps = 4
    train(config, tmp_path / "parts", accept_changes=True)
    resumed = weights(tmp_path / "parts/checkpoints")
    # The average can be switched off, and on again: then it begins with the parameters.
    for config.train.steps, config.train.ema_decay in ((5, 0.0), (6, 0.9)):
        train(config, tmp_path / "parts", accept_changes=True)
        assert find_checkpoint(tmp_path / "parts/checkpoints").name == str(config.train.steps)
    off = weights(tmp_path / "parts/checkpoints/5")
    whole, best = tmp_path / "whole/checkpoints", tmp_path / "whole/best"
    average, raw = weights(whole), weights(trained[0] / "checkpoints")
    assert any(not np.array_equal(off[name], value) for name, value in average.items())
    for other in (weights(best), resumed):
        for name, value in average.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
    # The average is not the parameters, and the parameters are those of a run without an average.
    assert any(not np.array_equal(raw[name], value) for name, value in average.items())
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        arguments = ocp.args.Composite(training=ocp.args.StandardRestore())
        trained_on = reader.restore((whole / "4").resolve(), args=arguments).training["params"]
    leaves = jax.tree_util.tree_leaves_with_path(trained_on)
    assert leaves
    for path, value in leaves:
        np.testing.assert_array_equal(value, raw[".".join(str(part.key) for part in path)])


@pytest.mark.slow
def test_two_processes_do_what_one_does(alone, coco, tmp_path):
    """Two processes on this machine each load, train on and evaluate one half. One process goes on from their checkpoint."""
    config = tiny.write_config(tmp_path / "tiny_config.py", coco, function="small")
    workdir = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hpr_jax.main", "--config", str(config), "--workdir", str(workdir), "--distributed"]
    meeting = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    environments = [tiny.process_environment(**meeting, JAX_PROCESS_ID=str(number)) for number in (0, 1)]
    pair = [subprocess.Popen(command, cwd=tiny.ROOT, env=environment) for environment in environments]
    assert [process.wait(timeout=600) for process in pair] == [0, 0]

    two, one = numbers(workdir), numbers(alone)
    assert [row["step"] for row in two] == [1, 2, 4, 4]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    ours, theirs = weights(workdir / "checkpoints"), weights(alone / "checkpoints")
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5, err_msg=name)
    assert (workdir / "train.1.log").is_file()

    longer = tiny.small(coco)
    longer.train.steps = 5
    train(longer, workdir, accept_changes=True)
    assert [row["step"] for row in numbers(workdir)] == [1, 2, 4, 4, 5, 5]
