"""Reads what runs leave behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from check_resume import VOLATILE
from flax import nnx

from hpr_jax.weights.checkpoint import load_detector


def lines(workdir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without numbers that depend on the process and its speed."""
    return [{name: line[name] for name in line if name not in VOLATILE} for line in lines(workdir)]


def weights(path: Path) -> dict[str, np.ndarray]:
    """All variables of the detector of a checkpoint, by name."""
    detector, _ = load_detector(path)
    return {".".join(map(str, k)): np.asarray(v.get_value()) for k, v in nnx.to_flat_state(nnx.state(detector))}
