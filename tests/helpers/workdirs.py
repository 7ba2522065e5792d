"""Reads what runs leave behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from check_resume import VOLATILE
from flax import nnx
from tensorboardX.proto.event_pb2 import Event, SessionLog

from hpr_jax.weights.checkpoint import load_detector


def lines(workdir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of each number in TensorBoard's files."""
    return [(event.step, value.tag, value.simple_value) for event, value in values(workdir) if not value.HasField("image")]


def values(workdir: Path) -> list[tuple[Event, Any]]:
    """All numbers and images in TensorBoard's files, each with its event."""
    return [(event, value) for event in _all_events(workdir) for value in event.summary.value]


def session_starts(workdir: Path) -> list[int]:
    """The steps at which TensorBoard's files say that a run begins or goes on."""
    return [event.step for event in _all_events(workdir) if event.session_log.status == SessionLog.START]


def _all_events(workdir: Path) -> Iterator[Event]:
    for path in sorted(workdir.glob("events.*")):
        data = path.read_bytes()
        while data:
            # Eight bytes of length and four of a checksum come first, and four of another one last.
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without numbers that depend on the process and its speed."""
    return [{name: line[name] for name in line if name not in VOLATILE} for line in lines(workdir)]


def weights(path: Path) -> dict[str, np.ndarray]:
    """All variables of the detector of a checkpoint, by name."""
    detector, _ = load_detector(path)
    return {".".join(map(str, k)): np.asarray(v.get_value()) for k, v in nnx.to_flat_state(nnx.state(detector))}
