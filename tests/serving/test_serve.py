"""The command `serve`: its mistakes, and a trained detector behind it, from its start to Ctrl-C."""

import pytest

pytest.importorskip("starlette", reason="The extra `serve` is not installed.")

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import tiny
from pictures import png
from served import FakeDetector, ask

import hpr_jax
from hpr_jax import main as command
from hpr_jax.errors import UserError
from hpr_jax.serving.app import make_app
from hpr_jax.serving.connections import make_server
from hpr_jax.serving.limits import Limits
from hpr_jax.serving.serve import _run, listen


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Serving needs --workdir DIR, the folder of a run, or --checkpoint PATH."),
        (["--workdir", "x", "--port", "70000"], "--port is 70000; it must be from 0 to 65535."),
        (["--workdir", "x", "--batch-size", "0"], "--batch-size is 0; it must be from 1 to 100000."),
        (["--workdir", "x", "--timeout", "nan"], "--timeout is nan; it must be from 0.001 to 100000."),
        (["--workdir", "x", "--max-upload=-1"], "--max-upload is -1; it must be from 0.001 to 100000."),
        (["--workdir", "x", "--host", "256.1.1.1", "--port=0"], "The server cannot be at 256.1.1.1, port 0: "),
        (["--workdir", "nowhere", "--port=0"], "no checkpoint in nowhere"),
        (["x"], "The command serve takes no inputs, and got x."),
    ],
)
def test_mistakes(arguments, sentence, restored_log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        command.run(["serve", *arguments])


def test_a_port_that_is_taken():
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        sentence = f"The server cannot be at 127.0.0.1, port {port}: address already in use; choose another --port"
        with pytest.raises(UserError, match=sentence):
            command.run(["serve", "--workdir", "x", "--port", str(port)])


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "python-multipart"])
def test_without_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    sentence = re.escape(f'serve needs the package {package}; install it with pip install "hpr_jax[serve]".')
    with pytest.raises(UserError, match=sentence):
        command.run(["serve", "--workdir", "x"])


def test_sigterm_is_an_orderly_end():
    limits = Limits()
    server, listener = make_server(make_app(FakeDetector(), "tiny", limits, ["localhost"]), limits), listen("127.0.0.1", 0)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert _run(server, listener) == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.slow
def test_a_trained_detector(trained):
    """It finds what it finds in Python, one by one and in batches, and Ctrl-C ends it as other commands."""
    workdir, _ = trained
    rng = np.random.default_rng(0)
    pictures = [png(rng.integers(0, 255, (48, side, 3)).astype(np.uint8)) for side in (60, 60, 60, 40, 60)]
    found = [one.to_dict() for one in hpr_jax.load(workdir)(pictures, 0.0)]
    line = [sys.executable, "-m", "hpr_jax.main", "serve", "--workdir", str(workdir), "--port", "0"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, env=tiny.process_environment(), stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    try:
        pages = (re.search(r"The page is at http://127\.0\.0\.1:(\d+)/; Ctrl-C stops", text) for text in process.stdout)
        port = int(next(page[1] for page in pages if page))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda picture: ask(port, "/detect?threshold=0", picture)[2], pictures * 4))
        for answer, expected in zip(answers, found * 4):
            assert (answer["width"], answer["height"]) == (expected["width"], expected["height"])
            # A batch is another program than that of a single image, and adds up in another order.
            scores = [one["score"] for one in expected["detections"]]
            assert [one["score"] for one in answer["detections"]] == pytest.approx(scores, rel=1e-3)
        assert max(answer["batch"] for answer in answers) == 2
        branches = ask(port, "/explain?top=4", pictures[0])[2]["branches"]
        assert list(branches) == ["primary", "regional_attention", "dynamic_conv"]
        best, detection = branches["primary"][-1][0], found[0]["detections"][0]
        assert (best["label"], best["name"]) == (detection["label"], detection["name"])
        assert best["score"] == pytest.approx(detection["score"], rel=1e-5)
        assert best["box"] == pytest.approx(detection["box"], abs=1e-2)
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (130, "hpr_jax: stopped.\n")
