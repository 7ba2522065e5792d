"""Checks that a run which is killed and started again ends like one that was left alone, bit for bit.

It kills a training run at random moments, starts it again each time, and compares weights, optimizer, best checkpoint and
metrics at the end with those of an undisturbed run.

    python scripts/check_resume.py [--kills 20] [--seed 0] [--workdir runs/check_resume] [--config FILE.py[:VARIANT]]
        [--reference WORKDIR] [--seconds S] [--config.section.key=value ...]

Every second kill comes while a checkpoint is being written. A run that ends before its kill is compared, deleted and begun
anew. --reference is a finished, undisturbed run of the same config; without it, the script makes one. --seconds is about
how long such a run takes. Without --config, the run is `configs/ddq.py:demo` on drawn shapes, cut down to 60 steps. Exits
with 1 if anything differs.
"""

import argparse
import datetime
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hpr_jax.weights.find_checkpoint import BEST, LATEST, PARTIAL

ROOT = Path(__file__).resolve().parent.parent
# Settings that cut the default run short.
SHORT = (
    "train.steps=60",
    "train.checkpoint_every=4",
    "train.evaluate_every=30",
    "train.log_every=7",
    "optimizer.milestones=(50,)",
)
# Columns of metrics.jsonl that depend on the process and its speed.
VOLATILE = ("images_per_second", "data_wait", "compilations")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All arrays of a checkpoint by name, and its metadata as `meta`."""
    items = {"meta": ocp.args.JsonRestore(), "model": ocp.args.StandardRestore()}
    if (path / "training").is_dir():
        items["training"] = ocp.args.StandardRestore()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        content = reader.restore(path.resolve(), args=ocp.args.Composite(**items))
    trees = {name: content[name] for name in items if name != "meta"}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {"meta": content["meta"], **{jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}}


def read_run(workdir: Path) -> dict[str, Any]:
    """Everything that a run leaves behind and that must not depend on kills, by name."""
    found: dict[str, Any] = {}
    for folder in (LATEST, BEST):
        names = sorted(path.name for path in (workdir / folder).iterdir())
        found[f"names in {folder}/"] = names
        for name in names:
            for key, value in read_checkpoint(workdir / folder / name).items():
                found[f"{folder}/{name}: {key}"] = value
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs between two runs, as `read_run` returns them."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return a == b

    return [
        name for name in sorted({*one, *other}) if name not in one or name not in other or not same(one[name], other[name])
    ]


class Trial:
    """Starts a run and kills it.

    Args:
      command: the command of a training run, without workdir.
      workdir: of the run; the log goes beside it.
      seconds: kills at a random moment come within this time after the start.
      rng: chooses the moments.
    """

    def __init__(self, command: list[str], workdir: Path, seconds: float, rng: random.Random):
        self.command, self.workdir, self.seconds, self.rng = command, workdir, seconds, rng

    def start(self) -> subprocess.Popen:
        with self.workdir.with_suffix(".log").open("a") as output:
            return subprocess.Popen([*self.command, "--workdir", str(self.workdir)], stdout=output, stderr=output)

    def kill(self, *, while_writing: bool) -> str | None:
        """Starts the run and kills it.

        Args:
          while_writing: kills while a checkpoint is being written; otherwise at a random moment.

        Returns:
          Which checkpoints there were at the kill, or None if the run ended before.
        """
        process = self.start()
        if while_writing:
            for _ in range(self.rng.randint(0, 2)):
                self._wait(process, self._writes)
                self._wait(process, lambda: not self._writes())
            self._wait(process, self._writes)
            # Writing a checkpoint of this size takes some tenths of a second.
            time.sleep(self.rng.uniform(0, 0.2))
        else:
            moment = time.monotonic() + self.rng.uniform(0, self.seconds)
            self._wait(process, lambda: time.monotonic() > moment)
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(f"The run failed with code {process.returncode}; see {self.workdir.with_suffix('.log')}.")
            return None
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder = self.workdir / LATEST
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return f"checkpoints: {', '.join(names) or 'none'}"

    def _writes(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.workdir / LATEST).glob(f"*{PARTIAL}*"))

    @staticmethod
    def _wait(process: subprocess.Popen, until: Callable[[], bool]) -> None:
        """Waits until the condition holds or the process has ended."""
        while process.poll() is None and not until():
            time.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/check_resume"))
    parser.add_argument("--config")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--seconds", type=float, help="latest moment of a kill; default: what the reference took")
    arguments, overrides = parser.parse_known_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    config = arguments.config
    if config is None:
        config, data = f"{ROOT}/configs/ddq.py:demo", arguments.workdir / "data"
        if not (data / "annotations/instances_val2017.json").exists():
            subprocess.run([sys.executable, "-m", "hpr_jax.main", "make-shapes", str(data)], check=True)
        overrides = [f"--config.{setting}" for setting in (*SHORT, f"data.directory={data}")] + overrides
    command = [sys.executable, "-m", "hpr_jax.main", "--config", config, *overrides]

    reference = arguments.reference
    if reference is None:
        reference = arguments.workdir / "reference"
        shutil.rmtree(reference, ignore_errors=True)
        # Twice: the first fills the compilation cache, the second tells how long a run takes.
        for _ in range(2):
            shutil.rmtree(reference, ignore_errors=True)
            began = time.monotonic()
            if Trial(command, reference, 0, random.Random()).start().wait():
                raise SystemExit(f"The run failed; see {reference.with_suffix('.log')}.")
            seconds = time.monotonic() - began
    else:
        times = [line.split(",")[0] for line in (reference / "train.log").read_text().splitlines() if line[:2] == "20"]
        first, last = (datetime.datetime.fromisoformat(times[place]) for place in (0, -1))
        # The log begins some seconds after the start.
        seconds = (last - first).total_seconds() + 5
    expected = read_run(reference)

    killed = arguments.workdir / "killed"
    shutil.rmtree(killed, ignore_errors=True)
    trial = Trial(command, killed, arguments.seconds or seconds, random.Random(arguments.seed))
    compared = 0

    def compare() -> None:
        nonlocal compared
        different = differences(expected, read_run(killed))
        if different:
            raise SystemExit(f"Different from the run left alone: {', '.join(different[:10])} ({len(different)} in all).")
        compared += 1
        print(f"    a run came to its end: the same {len(expected)} things", flush=True)

    number = 0
    while number < arguments.kills:
        where = trial.kill(while_writing=number % 2 == 1)
        if where is None:
            compare()
            shutil.rmtree(killed)
            continue
        number += 1
        print(f"kill {number:2} {'while writing' if number % 2 == 0 else 'at any moment'}: {where}", flush=True)
    if trial.start().wait():
        raise SystemExit(f"The run failed; see {killed.with_suffix('.log')}.")
    compare()
    print(f"{arguments.kills} kills, {compared} runs to the end, each the same as the run left alone, bit for bit.")


if __name__ == "__main__":
    main()
