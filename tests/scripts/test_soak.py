"""What the soak finds in its samples."""

import json
import os
import sys

import numpy as np
import pytest
import soak


def samples(**changes):
    """Twenty samples of a run that is as it should be, with other values in the last five."""
    flat = {"memory": 1000, "worker_memory": 60, "files": 10, "threads": 30, "checkpoints": 2, "step": 0}
    rows = np.array([[minute, *flat.values()] for minute in range(20)], float)
    rows[:, -1] = 100 * np.arange(20)
    # Checkpoints, files and threads come and go while one is saved.
    rows[::4, 3:6] += 5
    for name, value in changes.items():
        rows[-5:, 1 + list(soak.COLUMNS).index(name)] = value
    return rows


@pytest.mark.parametrize(
    ("changes", "grown"),
    [
        ({}, []),
        ({"memory": 1090, "worker_memory": 65}, []),
        ({"memory": 1110}, ["memory"]),
        ({"worker_memory": 67}, ["worker_memory"]),
        ({"files": 15, "threads": 35}, []),
        ({"files": 16, "threads": 36, "checkpoints": 8}, ["files", "threads", "checkpoints"]),
        ({"memory": 500, "step": 10_000}, []),
    ],
)
def test_what_has_grown(changes, grown, capsys):
    assert soak.judge(samples(**changes)) == grown
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + len(soak.COLUMNS)


def test_curves(tmp_path):
    soak.draw(samples(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="the script reads /proc, which only Linux has")
def test_a_sample_of_this_process(tmp_path):
    """Half a line of metrics, which the run is writing, does not count."""
    taken = soak.sample(os.getpid(), tmp_path)
    assert taken.keys() == soak.COLUMNS.keys()
    assert taken["memory"] > 10
    assert (taken["checkpoints"], taken["step"]) == (0, 0)
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (20, 40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 6')
    (tmp_path / "checkpoints/40").mkdir(parents=True)
    taken = soak.sample(os.getpid(), tmp_path)
    assert (taken["checkpoints"], taken["step"]) == (1, 40)
