"""Trains a tiny detector for hours, and shows whether memory, open files, threads and checkpoints stay what they are.

    python scripts/soak.py [--hours 2] [--output runs/soak] [--config.section.key=value ...]

It looks at the processes of the run every 15 seconds, ends it by SIGTERM, and leaves samples.csv and curves.png. It prints
a table that compares the second quarter of the time with the last one, and exits with 1 if memory grew by more than a tenth,
if there are more open files, threads or checkpoints, or if the run did not end as it was asked to. Linux alone.
"""

import argparse
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Seconds between two looks at the run.
INTERVAL = 15.0
# By how much memory may grow from the second quarter of the time to the last one.
GROWTH = 1.1
# What is looked at, with its unit. Workers are the processes that load batches.
COLUMNS = {
    "memory": "MB of the run",
    "worker_memory": "MB of its workers",
    "files": "open files",
    "threads": "threads",
    "checkpoints": "checkpoints",
    "step": "steps",
}
# Settings of the run, which make it tiny, and have it save and evaluate often.
SETTINGS = {
    "model.channels": 16,
    "model.heads": 2,
    "model.hidden": 24,
    "model.backbone.base_channels": 8,
    "model.neck.groups": 4,
    "model.queries.count": 20,
    "model.denoising.queries": 4,
    "train.batch_size": 2,
    "train.steps": 1_000_000,
    "train.checkpoint_every": 100,
    "train.evaluate_every": 400,
    "train.log_every": 20,
    "optimizer.milestones": "()",
    "data.workers": 1,
    "augmentation.sides": "(64,96)",
    "augmentation.max_side": 128,
    "data.buckets": 3,
    "evaluate.side": 96,
    "evaluate.max_side": 128,
}


def start(output: Path, overrides: list[str]) -> subprocess.Popen:
    """Draws the data, and starts the run."""
    command = [sys.executable, "-m", "hpr_jax.main"]
    data = output / "data"
    if not data.exists():
        subprocess.run([*command, "make-shapes", str(data), "--train", "60", "--val", "10"], cwd=ROOT, check=True)
    settings = [f"--config.{key}={value}" for key, value in {"data.directory": data.resolve(), **SETTINGS}.items()]
    command += ["--config", "configs/ddq.py:demo", "--workdir", str((output / "run").resolve()), *settings, *overrides]
    with (output / "console.log").open("w") as console:
        return subprocess.Popen(command, cwd=ROOT, stdout=console, stderr=subprocess.STDOUT)


def status(process: int) -> dict[str, int]:
    """The numbers in a process' `/proc/PID/status`."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) for name, value in pairs if value.split() and value.split()[0].isdigit()}


def children(process: int) -> list[int]:
    """The processes that a process has started and that are at work."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def sample(process: int, workdir: Path) -> dict[str, float]:
    """What `COLUMNS` names, now."""
    own = status(process)
    lines = workdir / "metrics.jsonl"
    # The last line may be half written.
    whole = lines.read_text().split("\n")[:-1] if lines.exists() else []
    checkpoints = workdir / "checkpoints"
    return {
        "memory": own["VmRSS"] / 1024,
        "worker_memory": sum(status(child)["VmRSS"] for child in children(process)) / 1024,
        "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "threads": own["Threads"],
        "checkpoints": len(list(checkpoints.iterdir())) if checkpoints.exists() else 0,
        "step": json.loads(whole[-1])["step"] if whole else 0,
    }


def watch(run: subprocess.Popen, workdir: Path, seconds: float, table: Path) -> np.ndarray:
    """Samples, `[n, 1 + columns]`, the first column being minutes; they are written to `table` as they are taken."""
    began, rows = time.monotonic(), []
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["minutes", *COLUMNS])
        while time.monotonic() - began < seconds and run.poll() is None:
            time.sleep(INTERVAL)
            try:
                taken = sample(run.pid, workdir)
            except (OSError, KeyError):
                # A process has ended between two looks at it.
                continue
            rows.append([(time.monotonic() - began) / 60, *taken.values()])
            writer.writerow([f"{number:.1f}" for number in rows[-1]])
            file.flush()
    return np.array(rows)


def draw(rows: np.ndarray, path: Path) -> None:
    """Writes the curves of all columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6), layout="constrained")
    for axis, (name, unit), values in zip(axes.flat, COLUMNS.items(), rows[:, 1:].T, strict=True):
        axis.plot(rows[:, 0], values)
        axis.set(title=name.replace("_", " "), xlabel="minutes", ylabel=unit)
        axis.set_ylim(0, 1.1 * max(values.max(), 1))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def judge(rows: np.ndarray) -> list[str]:
    """Prints the table, and returns what has grown."""
    quarter = max(1, len(rows) // 4)
    early, late = rows[quarter : 2 * quarter, 1:], rows[-quarter:, 1:]
    print(f"\n{'':16}{'2nd quarter':>14}{'last quarter':>14}{'ratio':>8}   (medians)")
    grown = []
    for column, name in enumerate(COLUMNS):
        before, after = np.median(early[:, column]), np.median(late[:, column])
        print(f"{name:16}{before:14,.0f}{after:14,.0f}{after / max(before, 1):8.2f}")
        limit = np.inf if name == "step" else GROWTH * before if "memory" in name else early[:, column].max()
        if after > limit:
            grown.append(name)
    return grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    arguments, overrides = parser.parse_known_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = start(arguments.output, overrides)
    try:
        rows = watch(run, arguments.output / "run", 3600 * arguments.hours, arguments.output / "samples.csv")
    finally:
        run.send_signal(signal.SIGTERM)
        code = run.wait()
    if len(rows) < 4:
        print(f"The run ended with {code} at once; {arguments.output}/console.log says why.")
        return 1
    draw(rows, arguments.output / "curves.png")
    grown = judge(rows)
    print(
        f"\n{rows[-1, 0]:.0f} minutes, {rows[-1, -1]:,.0f} steps, exit code {code}; grown: {', '.join(grown) or 'nothing'}"
    )
    return 1 if grown or code != 75 else 0


if __name__ == "__main__":
    sys.exit(main())
