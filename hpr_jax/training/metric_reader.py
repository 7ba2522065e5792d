"""Reads the numbers that a run has written to `metrics.jsonl`."""

import dataclasses
import json
import math
from pathlib import Path

# The value of metrics that nothing defines.
UNDEFINED = -1.0


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The lines of `metrics.jsonl`.

    Attributes:
      lines: the numbers of each line by name, `step` among them, in the order of the file.
      broken: number of lines that cannot be read.
    """

    lines: list[dict[str, float]]
    broken: int = 0

    def names(self, prefix: str) -> list[str]:
        """The names with a prefix, in the order in which the file has them first."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name.startswith(prefix)))

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a number; undefined precisions are NaN."""
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        undefined = name.startswith("val/")
        values = [math.nan if undefined and value == UNDEFINED else value for _, value in found]
        return [step for step, _ in found], values


def read_metrics(path: Path) -> Metrics:
    """Reads the file at a path, as far as it can be read. A file that does not exist has no lines.

    Raises:
      OSError: the file is there and cannot be read.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return Metrics([])
    lines, broken = [], 0
    for line in text.splitlines():
        numbers = _numbers(line)
        if numbers is None:
            broken += 1
        else:
            lines.append(numbers)
    return Metrics(lines, broken)


def _numbers(line: str) -> dict[str, float] | None:
    """The numbers of a line; None if it is no JSON object with a step."""
    try:
        content = json.loads(line)
        found = {name: float(value) for name, value in content.items() if isinstance(value, int | float)}
    except (ValueError, AttributeError, RecursionError, OverflowError):
        return None
    return found if "step" in found else None
