"""The report: JSON for programs, Markdown for people."""

import json
from pathlib import Path
from typing import Any

from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, text

MARKS = {GIVEN: "", MEASURED: " (m)", COMPUTED: " (c)"}
LEGEND = (
    "Columns marked (m) were measured in this run, on this machine: medians, ± half of the distance between the quartiles. "
    "Those marked (c) are computed from numbers measured in this run. The others are settings or counts."
)


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes report.json and report.md; a reader never finds a half-written one."""
    _replace(folder / "report.json", json.dumps(report, indent=1) + "\n")
    _replace(folder / "report.md", markdown(report))


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content)
    temporary.replace(path)


def markdown(report: dict[str, Any]) -> str:
    """The whole report as text."""
    lines = [f"# GPU report, {report['machine'].get('date', '')}", ""]
    if report["rehearsal"]:
        lines += ["**A rehearsal: small sizes on a CPU, kernels interpreted. The numbers say nothing about a GPU.**", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += ["", LEGEND, ""]
    lines += _table(["part", "result", "seconds", "limit"], [_summary(part) for part in report["parts"]])
    for part in report["parts"]:
        lines += ["", f"## {part['title']}", ""]
        if part["status"] != "done":
            lines += [f"**{part['status'].capitalize()}.** {part.get('reason', '')}".strip(), ""]
        for table in part["tables"]:
            names = [column["name"] for column in table["columns"]]
            heads = [column["name"] + MARKS[column["kind"]] for column in table["columns"]]
            rows = [[text(row.get(name)) for name in names] for row in table["rows"]]
            lines += [f"### {table['title']}", "", *_table(heads, rows), ""]
        lines += [f"- {note}" for note in part["notes"]]
        if part.get("error"):
            lines += ["", "The end of what it said:", "", *(f"    {line}" for line in part["error"].splitlines())]
    return "\n".join(lines).rstrip() + "\n"


def _summary(part: dict[str, Any]) -> list[str]:
    seconds = [f"{part[name]:.0f}" if part.get(name) is not None else "" for name in ("seconds", "limit")]
    return [part["title"], part["status"], *seconds]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
