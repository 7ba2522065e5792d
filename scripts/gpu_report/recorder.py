"""How a part hands on its results: tables, row by row, as lines of JSON, which stay when the part is killed.

The columns of a table are given (settings and counts), measured here, or computed from what was measured in the same run.
"""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timing import Timing

# Kinds of columns.
GIVEN, MEASURED, COMPUTED = "given", "measured", "computed"
# A folder with results may hold few and small files.
MOST_BYTES = 16 * 2**20
# Ending of the files beside a report.
SUFFIX = ".report.gz"
Cell = str | int | float | dict[str, float] | None


class Recorder:
    """Writes what a part finds to a file.

    Args:
      path: the file for the lines.
      folder: the report's folder, for files beside it.
    """

    def __init__(self, path: Path, folder: Path):
        self._path, self._folder = path, folder

    def table(self, title: str, columns: Mapping[str, str]) -> "Table":
        """Begins a table; columns are names with their kinds."""
        self._write({"table": title, "columns": [{"name": name, "kind": kind} for name, kind in columns.items()]})
        return Table(self, title, list(columns))

    def row(self, title: str, cells: Mapping[str, Cell]) -> None:
        self._write({"row": title, "cells": dict(cells)})

    def note(self, text: str) -> None:
        """A sentence for the reader of the report."""
        print(text, flush=True)
        self._write({"note": text})

    def keep(self, name: str, content: bytes) -> None:
        """Puts a compressed file beside the report, if it is small enough."""
        packed = gzip.compress(content, compresslevel=6)
        if len(packed) > MOST_BYTES:
            self.note(f"{name} is not kept: compressed it has {len(packed)} bytes.")
            return
        (self._folder / f"{name}{SUFFIX}").write_bytes(packed)
        self.note(f"{name}{SUFFIX} is beside this report.")

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Table:
    """One table of a part."""

    def __init__(self, recorder: Recorder, title: str, columns: Sequence[str]):
        self._recorder, self._title, self._columns = recorder, title, columns

    def add(self, cells: Mapping[str, Cell]) -> None:
        """Adds a row; cells that are not given stay empty."""
        unknown = set(cells) - set(self._columns)
        if unknown:
            raise KeyError(f"Table {self._title!r} has no columns {sorted(unknown)}.")
        self._recorder.row(self._title, cells)
        print(self._title, "|", *(f"{name} {text(cell)};" for name, cell in cells.items()), flush=True)


def milliseconds(timing: Timing) -> dict[str, float]:
    """A timing as a cell."""
    return {"median": 1e3 * timing.median, "spread": 1e3 * timing.spread, "repeats": timing.repeats}


def text(cell: Cell) -> str:
    """A cell as people read it: numbers with three or four digits, medians with their spread."""
    if cell is None:
        return ""
    if isinstance(cell, dict):
        spread = 100 * cell["spread"] / cell["median"] if cell["median"] else 0.0
        return f"{number(cell['median'])} ±{spread:.0f}%"
    return number(cell) if isinstance(cell, float) else str(cell)


def number(x: float) -> str:
    """A number with three or four digits."""
    if x == 0:
        return "0"
    if x != x or x in (float("inf"), float("-inf")):
        return str(x)
    if not 1e-3 <= abs(x) < 1e6:
        return f"{x:.2e}"
    digits = max(0, 3 - len(str(int(abs(x)))) + (abs(x) < 1))
    return f"{x:.{digits}f}"


def read(path: Path) -> dict[str, list[Any]]:
    """The tables and notes in the lines that a part wrote; a last line that was cut off is left out."""
    tables: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for line in _lines(path):
        if "table" in line:
            tables[line["table"]] = {"title": line["table"], "columns": line["columns"], "rows": []}
        elif "row" in line:
            tables[line["row"]]["rows"].append(line["cells"])
        else:
            notes.append(line["note"])
    return {"tables": list(tables.values()), "notes": notes}


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
