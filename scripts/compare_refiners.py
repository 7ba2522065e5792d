"""Tries the paper's claim at small size: three refiners in one decoder layer beat one. Prints a table with the spread.

    python scripts/compare_refiners.py [--workdir runs/compare] [--models ddq] [--seeds 3] [--steps 2000] [--data DIR]

For each model:
1. A plain detector is trained at a constant learning rate to its plateau: until three evaluations in a row have together
   gained no more than 0.005 AP.
2. The time of a step of the plain and of the HPR detector is measured in short runs that take turns.
3. From the plateau, with several seeds, the schedule of the variant is begun again: by the plain detector for as many steps
   (`plain`), by the plain detector for as much time as HPR takes (`plain, equal time`), and by HPR begun from the plain
   detector (`HPR`). HPR is also trained from scratch, for the steps of the plateau and of the schedule together
   (`HPR from scratch`).

Every run is an ordinary training run in a folder of its own below the workdir. The script can be stopped at any time. When
it is started again, it leaves out finished runs and goes on with the one that was stopped. After each run it prints the
table of all finished runs. Without --data it trains on drawn shapes, 2000 images and 300 held out. With the variant `demo`
and three seeds it takes about five hours on two CPU cores.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpr_jax.training.metric_reader import read_metrics
from hpr_jax.training.resume import Progress

ROOT = Path(__file__).resolve().parent.parent
# The plateau: so many evaluations in a row gain no more than this together. It is looked for up to MOST_STEPS.
PATIENCE, MIN_GAIN, EVALUATE_EVERY, MOST_STEPS = 3, 0.005, 500, 20_000
# Runs whose speed is measured: so many of each kind take turns, of so many steps.
TURNS, TURN_STEPS = 3, 60
# The share of a schedule behind which the learning rate falls.
MILESTONE = 0.8

PLAIN: dict[str, Any] = {"model.refiner.auxiliaries": "()"}
# HPR that begins as a plain detector, as the variants from_plain_* set it.
FROM_PLAIN: dict[str, Any] = {
    "model.refiner.merge_initial": "(1.0,0.0,0.0)",
    "optimizer.merge_multiplier": 10.0,
    "optimizer.merge_decay": False,
}
# Ways of training whose results are compared, in the order of the table.
WAYS = ("plain", "plain, equal time", "HPR", "HPR from scratch")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to: steps, and AP and AP50 of its last evaluation."""

    steps: int
    ap: float
    ap50: float


class Comparison:
    """The runs of one model.

    Args:
      folder: of all its runs.
      config: FILE.py:VARIANT that they train.
      data: folder in COCO layout.
      steps: of the schedule that begins at the plateau.
      every: steps between two evaluations.
    """

    def __init__(self, folder: Path, config: str, data: Path, steps: int, every: int = EVALUATE_EVERY):
        self.folder, self._config, self._data, self._steps, self._every = folder, config, data, steps, every

    def prepare(self) -> None:
        """Trains the plain detector to its plateau, and measures how long steps take; leaves out what is done."""
        if self.plateau() is None:
            patience = {"train.patience": PATIENCE, "train.min_gain": MIN_GAIN, "optimizer.milestones": "()"}
            self._train("plateau", MOST_STEPS, {**PLAIN, **patience})
            plateau = self.plateau()
            assert plateau is not None, "a training run that ends has made its last evaluation"
            print(f"The plateau is reached after {plateau.steps} steps, at AP {plateau.ap:.3f}.", flush=True)
        for turn in range(TURNS):
            for kind, overrides in (("plain", PLAIN), ("HPR", {})):
                name = f"speed_{kind}_{turn}"
                if finished(self.folder / name, TURN_STEPS) is None:
                    self._train(name, TURN_STEPS, {**overrides, "train.log_every": 10})

    def plateau(self) -> Result | None:
        """The run to the plateau, if it is finished."""
        rows = [row for row in metrics(self.folder / "plateau") if "val/AP" in row]
        progress = Progress()
        for row in rows:
            progress.note_evaluation(row["val/AP"], MIN_GAIN)
            if progress.stale == PATIENCE or row["step"] == MOST_STEPS:
                return Result(int(row["step"]), row["val/AP"], row["val/AP50"])
        return None

    def slowness(self) -> float:
        """How much longer a step of HPR takes than one of the plain detector."""
        seconds = {}
        for kind in ("plain", "HPR"):
            rows = [row for turn in range(TURNS) for row in metrics(self.folder / f"speed_{kind}_{turn}")]
            # The first lines of a run have its compilation.
            speeds = [row["images_per_second"] for row in rows if "loss" in row and row["step"] > TURN_STEPS // 3]
            seconds[kind] = 1 / statistics.median(speeds)
        return seconds["HPR"] / seconds["plain"]

    def length(self, way: str) -> int:
        """Steps of a run."""
        plateau = self.plateau()
        assert plateau is not None, "all ways begin behind the plateau"
        if way == "HPR from scratch":
            return plateau.steps + self._steps
        return round(self._steps * self.slowness()) if way == "plain, equal time" else self._steps

    def train(self, way: str, seed: int) -> None:
        """Makes a run, or goes on with it."""
        steps = self.length(way)
        falls = steps - self._steps + int(self._steps * MILESTONE) if way == "HPR from scratch" else int(steps * MILESTONE)
        overrides: dict[str, Any] = {"optimizer.milestones": f"({falls},)", "train.seed": seed}
        if way != "HPR from scratch":
            overrides["train.initial_weights"] = self.folder / "plateau"
            overrides |= FROM_PLAIN if way == "HPR" else PLAIN
        self._train(self._name(way, seed), steps, overrides)

    def result(self, way: str, seed: int) -> Result | None:
        """What a run came to; None if it is not finished."""
        return finished(self.folder / self._name(way, seed), self.length(way))

    def _name(self, way: str, seed: int) -> str:
        return f"{way.replace(',', '').replace(' ', '_')}_{seed}"

    def _train(self, name: str, steps: int, overrides: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "hpr_jax.main", "train", "--config", self._config]
        command += ["--workdir", str(self.folder / name), f"--config.data.directory={self._data}", "--config.train.epochs=0"]
        command += [f"--config.train.steps={steps}", f"--config.train.evaluate_every={min(self._every, steps)}"]
        command += [f"--config.{key}={value}" for key, value in overrides.items()]
        subprocess.run(command, check=True)


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics of a run, none if it has not begun."""
    return read_metrics(folder / "metrics.jsonl").lines


def finished(folder: Path, steps: int) -> Result | None:
    """What a run that has made all steps came to, else None."""
    ends = [row for row in metrics(folder) if row["step"] == steps and "val/AP" in row]
    return Result(steps, ends[-1]["val/AP"], ends[-1]["val/AP50"]) if ends else None


def table(comparisons: Mapping[str, Comparison], seeds: Iterable[int]) -> str:
    """A Markdown table of the finished runs. Gains are over `plain` with the same seed."""
    lines = [
        "| model | way | steps | time of a step | AP by seed | mean AP | gain by seed | mean gain | mean AP50 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, comparison in comparisons.items():
        plateau = comparison.plateau()
        if plateau is None:
            continue
        lines.append(f"| {model} | plateau | {plateau.steps} | 1.00 | {plateau.ap:.3f} | | | | {plateau.ap50:.3f} |")
        base = {seed: result for seed in seeds if (result := comparison.result("plain", seed))}
        for way in WAYS:
            results = {seed: result for seed in seeds if (result := comparison.result(way, seed))}
            if not results:
                continue
            gains = [result.ap - base[seed].ap for seed, result in results.items() if seed in base and way != "plain"]
            slowness = comparison.slowness() if way.startswith("HPR") else 1.0
            cells = [model, way, comparison.length(way), f"{slowness:.2f}", _list(result.ap for result in results.values())]
            cells.append(f"{statistics.mean(result.ap for result in results.values()):.3f}")
            cells += [_list(gains, "+"), f"{statistics.mean(gains):+.3f}" if gains else ""]
            cells.append(f"{statistics.mean(result.ap50 for result in results.values()):.3f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _list(numbers: Iterable[float], sign: str = "") -> str:
    return ", ".join(format(number, f"{sign}.3f") for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--models", nargs="+", default=["ddq"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--variant", default="demo")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    if arguments.data is None:
        arguments.data = arguments.workdir / "data"
        if not (arguments.data / "annotations" / "instances_val2017.json").exists():
            drawn = ["make-shapes", str(arguments.data), "--train", "2000", "--val", "300"]
            subprocess.run([sys.executable, "-m", "hpr_jax.main", *drawn], check=True)
    name = f"{arguments.variant}_{arguments.steps}_steps_of_{arguments.data.name}"
    comparisons = {
        model: Comparison(
            arguments.workdir / name / model,
            f"{ROOT}/configs/{model}.py:{arguments.variant}",
            arguments.data,
            arguments.steps,
        )
        for model in arguments.models
    }
    seeds = range(arguments.seeds)
    for comparison in comparisons.values():
        comparison.prepare()
        # The ways from the plateau come first: they answer the question, and take the least time.
        runs = [(way, seed) for seed in seeds for way in WAYS[:-1]] + [(WAYS[-1], seed) for seed in seeds]
        for way, seed in runs:
            if comparison.result(way, seed) is None:
                comparison.train(way, seed)
                print(table(comparisons, seeds), flush=True)
    print(table(comparisons, seeds))


if __name__ == "__main__":
    main()
