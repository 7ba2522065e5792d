"""A batch gives the same losses and weights however it is split over devices, here virtual ones, and over parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

# Programs for one and for eight devices are compiled.
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ways(coco):
    """What `tests/helpers/on_devices.py` prints."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # NPROC is the number of XLA's threads: devices that wait for one another need one each.
    environment = tiny.process_environment(XLA_FLAGS=flags, NPROC="32")
    command = [sys.executable, str(HERE.parent / "helpers/on_devices.py"), str(coco)]
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
