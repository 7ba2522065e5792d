"""The console cannot end a run: closed pipes, full disks, characters it lacks, Ctrl-C, errors of libraries' threads."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from hpr_jax.runtime.console import interruptible, leave, protect_from_console, tolerant
from hpr_jax.runtime.files import whole_file

MAIN = [sys.executable, "-m", "hpr_jax.main"]


def test_a_closed_pipe_takes_everything():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        written = tolerant(stream)
        print("first", file=written)
        assert os.read(read, 100) == b"first\n"
        os.close(read)
        for _ in range(3):
            print("more" * 10_000, file=written, flush=True)
        written.flush()


def test_a_full_disk_takes_everything():
    with open("/dev/full", "w") as stream:  # noqa: PTH123
        print("more" * 10_000, file=tolerant(stream), flush=True)


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    with (tmp_path / "x").open("w", encoding="ascii") as stream:
        print("车 \ud800", file=tolerant(stream), flush=True)
    assert (tmp_path / "x").read_text() == "\\u8f66 \\ud800\n"


def test_streams_that_are_no_files_stay():
    class Stream:
        def write(self, text): ...

    stream = Stream()
    assert tolerant(stream) is stream


@pytest.fixture
def protected(monkeypatch):
    """A protected console, which is as before afterwards."""
    for owner, name in (
        (sys, "excepthook"),
        (sys, "unraisablehook"),
        (threading, "excepthook"),
        (sys, "stdout"),
        (sys, "stderr"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr("logging.raiseExceptions", True)
    protect_from_console()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("event loop is closed"), "A thread has ended with RuntimeError: event loop is closed"),
        (OSError(errno.ENOSPC, "No space left on device"), ""),
    ],
)
def test_threads_that_end_early_are_a_line_of_the_log(protected, caplog, capfd, error, sentence):
    def fail():
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    # A library's own threads, which Python did not start, come here.
    thread = threading.Thread(target=lambda: sys.excepthook(type(error), error, None))
    thread.start()
    thread.join()
    assert caplog.messages == ([sentence] if sentence else [])
    assert "Traceback" not in capfd.readouterr().err


def test_an_interrupt_that_a_callback_loses_comes_again(protected):
    """Python prints errors of `__del__`, which nobody could catch, and goes on."""
    # In a background job of a shell, Python finds the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Lossy:
        def __del__(self):
            raise KeyboardInterrupt

    def lose():
        one = Lossy()
        del one
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        lose()
    signal.signal(signal.SIGINT, before)


def run(command, **keywords):
    return subprocess.run(command, env=tiny.process_environment(), capture_output=True, text=True, timeout=60, **keywords)


def test_a_reader_that_leaves_is_no_error():
    done = run(["bash", "-c", f"set -o pipefail; {' '.join(MAIN)} --help-config | head -1"])
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_a_console_without_a_character(tmp_path):
    name = "车.py"
    done = run([*MAIN, "--config", str(tmp_path / name)], cwd=tmp_path)
    assert done.returncode == 2
    env = {**tiny.process_environment(), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*MAIN, "--config", str(tmp_path / name)], env=env, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert b"\\u8f66.py" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("after", [0.3, 0.8, 1.5])
def test_ctrl_c_while_starting(tmp_path, after):
    """After these times the process imports, reads the config, and imports JAX, on most machines."""
    config = tiny.write_config(tmp_path / "config.py", tiny.write_coco(tmp_path / "data"))
    command = [*MAIN, "--config", str(config), "--workdir", str(tmp_path / "run")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=tiny.process_environment(), stdout=pipe, stderr=pipe, text=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    # The config imports JAX early: where its packages for GPUs are installed, they say that there is none.
    others = ("Could not find cuda drivers", "before absl::InitializeLog()")
    lines = [line for line in errors.splitlines() if not any(words in line for words in others)]
    assert lines == ["hpr_jax: stopped."]


# The main thread is in the middle of a computation of minutes, as when a program is compiled.
BUSY = """
import hashlib, signal
from hpr_jax.runtime.console import hear_signals, leave
from hpr_jax.training.stopping import StopRequests
signal.signal(signal.SIGINT, leave)
hear_signals()
with {context}:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2_000_000_000)
"""


@pytest.mark.parametrize(("context", "times"), [("__import__('contextlib').nullcontext()", 1), ("StopRequests()", 2)])
def test_ctrl_c_in_the_middle_of_a_compilation(context, times):
    """In a run the first one is answered with a sentence, and the second one ends it."""
    command, pipe = [sys.executable, "-c", BUSY.format(context=context)], subprocess.PIPE
    process = subprocess.Popen(command, env=tiny.process_environment(), stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    if times == 2:
        sentence = "SIGINT: the run ends when its step is done and saved. Another Ctrl-C ends it without.\n"
        assert process.stderr.readline() == sentence
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "hpr_jax: stopped.\n")


def test_what_must_be_finished_is_interrupted_by_an_exception():
    before = signal.signal(signal.SIGINT, leave)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is leave
        # A file that is being written is deleted, and nested contexts leave the outer one as it is.
        with interruptible():
            with interruptible():
                pass
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    # In a notebook Ctrl-C is not ours.
    with interruptible():
        assert signal.getsignal(signal.SIGINT) is before


def test_a_file_that_is_interrupted_is_deleted(tmp_path):
    before = signal.signal(signal.SIGINT, leave)

    def write():
        with whole_file(tmp_path / "x") as partial:
            partial.write_text("half")
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            write()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())
