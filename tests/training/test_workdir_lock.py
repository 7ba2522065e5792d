"""A workdir has one owner, and a run that was killed is none."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
import tiny

from hpr_jax.errors import UserError
from hpr_jax.training.workdir_lock import NAME, owned

HOLD = """
import sys, time
from pathlib import Path
from hpr_jax.training.workdir_lock import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused(tmp_path):
    workdir = tmp_path / "run"
    with owned(workdir):
        with (
            pytest.raises(UserError, match=rf"run belongs to a run that is at work \(process {os.getpid()} on .* since 20"),
            owned(workdir),
        ):
            pass
        with pytest.raises(UserError, match="Wait for its end, or choose another workdir"), owned(workdir, take_over=True):
            pass
        # Another workdir is another matter.
        with owned(tmp_path / "other"):
            pass
    with owned(workdir):
        pass


def test_an_error_gives_the_workdir_back(tmp_path):
    with pytest.raises(ZeroDivisionError), owned(tmp_path):
        raise ZeroDivisionError
    with owned(tmp_path):
        pass


def test_what_a_killed_run_leaves_keeps_nobody_out(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=tiny.process_environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on "), owned(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert f"process {process.pid} " in (tmp_path / NAME).read_text()
    with owned(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / NAME).read_text()


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"has no locks \(No locks available\).*--take-over"), owned(tmp_path):
        pass
    with owned(tmp_path, take_over=True):
        pass
