"""Trains plain detectors and HPR for equally many steps, several seeds each, and prints a table of average precision.

    python scripts/compare_refiners.py [--workdir runs/compare] [--models ddq dino] [--seeds 3] [--steps 400]
        [--variant demo] [--data DIR]

Every run is an ordinary training run in a folder of its own below the workdir. The script can be stopped at any time. When
it is started again, it leaves out finished runs and goes on with the one that was stopped. After each run it prints the
table of all finished runs. Without --data it trains on drawn shapes.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Kinds of detectors, and the overrides that make them of a config.
KINDS: dict[str, tuple[str, ...]] = {"plain": ("--config.model.refiner.auxiliaries=()",), "HPR": ()}


def finished(folder: Path, steps: int) -> dict[str, float] | None:
    """AP, AP50 and images a second of a run that has made all steps, else None."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        # A run that was stopped may have left half a line, which it mends when it goes on.
        return None
    ends = [row for row in rows if row["step"] == steps and "val/AP" in row]
    if not ends:
        return None
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return {"AP": ends[-1]["val/AP"], "AP50": ends[-1]["val/AP50"], "speed": statistics.median(speeds)}


def train(arguments: argparse.Namespace, model: str, kind: str, seed: int, folder: Path) -> None:
    """Starts a run, or goes on with one that was stopped."""
    steps = arguments.steps
    command = [sys.executable, "-m", "hpr_jax.main", "--config", f"{ROOT}/configs/{model}.py:{arguments.variant}"]
    command += ["--workdir", str(folder), f"--config.data.directory={arguments.data}", f"--config.train.seed={seed}"]
    command += [f"--config.train.steps={steps}", "--config.train.epochs=0", f"--config.train.evaluate_every={steps}"]
    command += KINDS[kind]
    command += [f"--config.optimizer.milestones=({steps * 4 // 5},)"]
    subprocess.run(command, check=True)


def table(arguments: argparse.Namespace) -> str:
    """A Markdown table of the finished runs."""
    lines = [
        f"| model | refiners | AP by seed, {arguments.steps} steps | mean AP | gain | mean AP50 | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in arguments.models:
        means: dict[str, float] = {}
        for kind in KINDS:
            folders = [run_folder(arguments, model, kind, seed) for seed in range(arguments.seeds)]
            runs = [run for folder in folders if (run := finished(folder, arguments.steps))]
            if not runs:
                continue
            means[kind] = statistics.mean(run["AP"] for run in runs)
            gain = f"{means['HPR'] - means['plain']:+.3f}" if len(means) == len(KINDS) else ""
            by_seed = ", ".join(f"{run['AP']:.3f}" for run in runs)
            ap50, speed = (statistics.mean(run[key] for run in runs) for key in ("AP50", "speed"))
            lines.append(f"| {model} | {kind} | {by_seed} | {means[kind]:.3f} | {gain} | {ap50:.3f} | {speed:.1f} |")
    return "\n".join(lines)


def run_folder(arguments: argparse.Namespace, model: str, kind: str, seed: int) -> Path:
    """The workdir of a run."""
    name = f"{arguments.variant}_{arguments.steps}_steps_of_{arguments.data.name}"
    return arguments.workdir / name / f"{model}_{kind}_{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--models", nargs="+", default=["ddq", "dino"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--variant", default="demo")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    if arguments.data is None:
        arguments.data = arguments.workdir / "data"
        if not (arguments.data / "annotations" / "instances_val2017.json").exists():
            subprocess.run([sys.executable, "-m", "hpr_jax.main", "make-shapes", str(arguments.data)], check=True)
    for seed in range(arguments.seeds):
        for model in arguments.models:
            for kind in KINDS:
                folder = run_folder(arguments, model, kind, seed)
                if finished(folder, arguments.steps) is None:
                    train(arguments, model, kind, seed, folder)
                    print(table(arguments), flush=True)
    print(table(arguments))


if __name__ == "__main__":
    main()
