"""Where the numbers come from: date, card, driver, versions, commit. It imports nothing that would start the GPU."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "numpy", "scipy", "torch", "triton")
CUPY = ("cupy", "cupy-cuda13x", "cupy-cuda12x")
CARD = {"name": "card", "driver_version": "driver", "memory.total": "memory of the card"}


def describe(root: Path) -> dict[str, str]:
    """What this machine is, in words; `root` is the project's folder."""
    facts = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    facts |= _card() or {"card": "none found: nvidia-smi did not answer"}
    facts |= {"processors": str(os.cpu_count()), "python": platform.python_version()}
    for package in (*PACKAGES, *CUPY):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _answer(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if commit:
        changed = _answer(["git", "-C", str(root), "status", "--porcelain"])
        facts["commit"] = commit + (" and changes that are not committed" if changed else "")
    return facts


def _card() -> dict[str, str]:
    answer = _answer(["nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader"])
    if not answer:
        return {}
    return dict(zip(CARD.values(), (field.strip() for field in answer.splitlines()[0].split(","))))


def _answer(command: list[str]) -> str:
    """What a command prints, or nothing if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
