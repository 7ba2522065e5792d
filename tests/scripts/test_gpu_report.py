"""The report of a GPU is written whatever happens to its parts. Parts are stubs here; `--rehearse` runs the real ones."""

import ast
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sampling_in_float64 as definition
from gpu_report import command_line, recorder, reference, report
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED
from gpu_report.runner import Part, run_parts

ROOT = Path(__file__).parents[2]
# Without a site and its packages: they take no time to start.
PYTHON = (sys.executable, "-S", "-c")
WRITE_ROW = """
import json, sys
with open(sys.argv[1], "a") as file:
    for line in ({"table": "T", "columns": [{"name": "ms", "kind": "measured"}]}, {"row": "T", "cells": {"ms": 2.5}}):
        file.write(json.dumps(line) + "\\n")
print("one row written", flush=True)
"""
CRASH = "import os; print('the last words', flush=True); os.kill(os.getpid(), 11)"
FAIL = "raise SystemExit('three of four are wrong')"
# With a child, which must not live on.
HANG = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']);"
    "print(child.pid, flush=True); child.wait()"
)


def stub(name: str, code: str, seconds: float = 20.0) -> Part:
    return Part(name, f"Part {name}", seconds, (*PYTHON, code))


def test_parts_that_fail_do_not_end_the_report(tmp_path, monkeypatch):
    written = []
    write = report.write

    def spy(folder, found):
        write(folder, found)
        parts = json.loads((folder / "report.json").read_text())["parts"]
        assert all(part["title"] in (folder / "report.md").read_text() for part in parts)
        written.append([part["status"] for part in parts])

    monkeypatch.setattr(report, "write", spy)
    parts = [stub("hangs", WRITE_ROW + HANG, 1.0), stub("crashes", CRASH), stub("fails", FAIL), stub("works", WRITE_ROW)]
    # Nothing is left over for the first part.
    seconds = sum(part.seconds for part in parts) + 0.3
    start = time.monotonic()
    found = run_parts(parts, tmp_path, seconds, {"card": "none"})
    assert time.monotonic() - start < 15

    hung, crashed, failed, worked = found["parts"]
    assert [part["status"] for part in found["parts"]] == ["stopped at its limit", "failed", "failed", "done"]
    assert hung["tables"][0]["rows"] == [{"ms": 2.5}]
    assert not Path("/proc", hung["error"].split()[-1], "exe").exists()
    assert crashed["reason"] == "It was ended by signal 11."
    assert "the last words" in crashed["error"]
    assert "three of four are wrong" in failed["error"]
    assert "error" not in worked
    assert worked["tables"][0]["rows"] == [{"ms": 2.5}]
    assert found == json.loads((tmp_path / "report.json").read_text())
    # In order, and complete whenever it was written.
    done = ["stopped at its limit", "failed", "failed", "done"]
    for place in range(4):
        assert [*done[:place], "running", *["waiting"] * (3 - place)] in written
    text = (tmp_path / "report.md").read_text()
    assert text.index("## Part hangs") < text.index("## Part crashes") < text.index("## Part works")
    assert "| ms (m) |" in text
    assert "| 2.50 |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "report.json", "report.md"}
    assert (tmp_path / "log.txt").read_text().count("one row written") == 2


def test_parts_that_do_not_fit_are_left_out(tmp_path):
    parts = [stub("long", "", 50.0), stub("cut", "", 30.0), stub("short", "", 5.0)]
    found = run_parts(parts, tmp_path, 20.0, {})
    long, cut, short = found["parts"]
    assert long["status"] == "left out"
    assert long["reason"].startswith("It may take 50 s, and ")
    # A part may have less than its limit if that is more than half of it.
    assert cut["status"] == "done"
    assert 15 < cut["limit"] <= 20
    assert short["status"] == "done"
    # What the others do not need is its own.
    assert 15 < short["limit"] <= 20


def test_why_xla_ended_a_part_is_kept(tmp_path):
    said = "F1127 01:00:00.0 1 tiling.cc:703] Check failed: a == b"
    code = f"import os; print({said!r}); print('x' * 5000, flush=True); os.abort()"
    (part,) = run_parts([stub("aborts", code)], tmp_path, 20.0, {})["parts"]
    assert part["status"] == "failed"
    assert part["error"].startswith(f"{said}\nxxx")


def test_records_that_were_cut_off(tmp_path):
    path = tmp_path / "records"
    writer = recorder.Recorder(path, tmp_path)
    table = writer.table("T", {"size": GIVEN, "ms": MEASURED, "ratio": COMPUTED})
    table.add({"size": 8, "ms": {"median": 12.345, "spread": 0.5, "repeats": 9}, "ratio": 1.5})
    writer.note("A note.")
    writer.keep("trace", b"abc")
    with path.open("a") as file:
        file.write('{"row": "T", "ce')
    found = recorder.read(path)
    assert [len(found["tables"]), len(found["tables"][0]["rows"]), len(found["notes"])] == [1, 1, 2]
    assert (tmp_path / "trace.report.gz").exists()
    with pytest.raises(KeyError, match="no columns"):
        table.add({"seconds": 1.0})
    part = {"title": "Part", "status": "done", **found}
    text = report.markdown({"machine": {"date": "today"}, "rehearsal": False, "parts": [part]})
    assert "| size | ms (m) | ratio (c) |\n| --- | --- | --- |\n| 8 | 12.3 ±4% | 1.50 |" in text


@pytest.mark.parametrize(
    ("number", "text"), [(0.0, "0"), (0.01234, "0.012"), (3.14159, "3.14"), (1234.5, "1234"), (2e-7, "2.00e-07")]
)
def test_numbers_are_short(number, text):
    assert recorder.number(number) == text


def test_real_parts_exist_in_order_and_fit():
    parts = command_line.make_parts(rehearse=False)
    assert [part.name for part in parts] == [
        "card",
        "rates",
        "correctness",
        "operations",
        "inference",
        "attention",
        "selection",
        "training",
        "sweep",
        "inference_float32",
    ]
    assert sum(part.seconds for part in parts) <= command_line.SECONDS
    assert all(part.environment["JAX_PLATFORMS"] == "cuda,cpu" for part in parts)


def module_file(name: str) -> Path | None:
    """The file of a module of this project."""
    for folder in (ROOT, ROOT / "scripts", ROOT / "scripts/benchmarks"):
        base = folder.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def imported(name: str) -> set[str]:
    """What a module imports when it is imported itself, with the packages that it is in, and names that may be modules."""
    found = {name.rpartition(".")[0]} - {""}
    path = module_file(name)
    waiting: list[ast.AST] = list(ast.parse(path.read_text()).body) if path else []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def test_parts_import_neither_what_loads_data_nor_what_draws():
    """A machine that is lent for an hour has what computes, and little else."""
    waiting = {f"gpu_report.parts.{name}" for name, *_ in command_line.PARTS}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= imported(name) - seen
    assert {"hpr_jax.inference.detect", "hpr_jax.losses.matching", "jax"} <= seen
    absent = ("grain", "supervision", "hotcoco", "tensorflow_datasets", "torch", "cupy")
    assert not {name for name in seen if name.split(".")[0] in absent}


def test_the_reference_is_the_definition():
    value, locations, weights, gradient = definition.inputs(np.random.default_rng(0))
    expected = definition.sample_in_float64(value, definition.SHAPES, locations, weights, gradient)
    found = reference.deformable_sampling(value, definition.SHAPES, locations, weights, gradient)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
