"""Reads what runs leave behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from check_resume import VOLATILE
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

from hpr_jax.weights.checkpoint import load_detector


def lines(workdir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of each number in TensorBoard's files."""
    found = []
    for path in sorted(workdir.glob("events.*")):
        data = path.read_bytes()
        while data:
            # Eight bytes of length and four of a checksum come first, and four of another one last.
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without numbers that depend on the process and its speed."""
    return [{name: line[name] for name in line if name not in VOLATILE} for line in lines(workdir)]


def weights(path: Path) -> dict[str, np.ndarray]:
    """All variables of the detector of a checkpoint, by name."""
    detector, _ = load_detector(path)
    return {".".join(map(str, k)): np.asarray(v.get_value()) for k, v in nnx.to_flat_state(nnx.state(detector))}
