"""A batch has the same losses and gives the same weights however it is split: over virtual devices, over parts, and over two
processes that meet on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.checkpoint import load_detector

HERE = Path(__file__).parent
VOLATILE = ("images_per_second", "data_wait", "compilations")

CONFIG = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import tiny


def get_config():
    return tiny.config(Path({coco!r}))
"""


def process_environment(**more):
    """That of a process with this project, the tests' modules and their compilation cache."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, **more}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="module")
def ways(coco):
    """What on_devices.py found."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # NPROC: devices that wait for one another need threads enough.
    environment = process_environment(XLA_FLAGS=flags, NPROC="32")
    command = [sys.executable, str(HERE / "on_devices.py"), str(coco)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def test_losses_and_weights_do_not_depend_on_the_split(ways):
    one, other = ways["1 x 1"], ways["8 x 2"]
    assert one["moved"] > 1e-4
    for ours, theirs in zip(other["numbers"], one["numbers"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert other["distance"] < 1e-5


def test_nothing_is_compiled_twice(ways):
    assert ways["1 x 1"]["recompiled"] == ways["8 x 2"]["recompiled"] == 0


def test_counts_of_processes_are_summed(ways):
    assert all(row["reports"] == 3 for way in ("1 x 1", "8 x 2") for row in ways[way]["numbers"])


def test_every_image_is_evaluated_once(ways):
    found = [detection["image_id"] for detection in ways["detections"]]
    assert found == sorted([7, 17, 27] * 10)


def test_two_processes_do_what_one_does(coco, tmp_path):
    """They meet on this machine; each loads, trains on and evaluates its half. The checkpoint goes on in one process."""
    config = tmp_path / "tiny_config.py"
    config.write_text(CONFIG.format(tests=str(HERE), coco=str(coco)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(workdir, *options, **environment):
        command = [sys.executable, "-m", "hpr_jax.main", "--config", str(config), "--workdir", str(workdir), *options]
        return subprocess.Popen(command, cwd=HERE.parent, env=process_environment(**environment))

    meeting = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    pair = [start(tmp_path / "two", "--distributed", **meeting, JAX_PROCESS_ID=str(number)) for number in (0, 1)]
    assert [process.wait(timeout=600) for process in pair] == [0, 0]
    assert start(tmp_path / "one").wait(timeout=600) == 0

    two, one = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2, 4, 4]
    for ours, theirs in zip(two, one):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    ours, theirs = weights(tmp_path / "two/checkpoints"), weights(tmp_path / "one/checkpoints")
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5, err_msg=name)
    assert (tmp_path / "two/train.1.log").is_file()

    more = start(tmp_path / "two", "--config.train.steps=5", "--accept-changes")
    assert more.wait(timeout=600) == 0
    assert [row["step"] for row in numbers(tmp_path / "two")][4:] == [5, 5]


def numbers(workdir):
    """Lines of a run's metrics without times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in VOLATILE} for row in rows]


def weights(path):
    detector, _ = load_detector(path)
    return {".".join(map(str, k)): np.asarray(v.get_value()) for k, v in nnx.to_flat_state(nnx.state(detector))}
