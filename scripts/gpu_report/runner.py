"""Runs the parts one after the other, each as a process with a limit of time, and writes the report after each."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_report import recorder, report

# How much of the end of a part's output is kept, in characters: in the report if it fails, and in the log.
ERROR_CHARACTERS, LOG_CHARACTERS = 2500, 400_000
# The line in which XLA says why it ends the process. A long list of functions follows it.
FATAL = re.compile(r"^F\d{4} .*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
      name, title: its name in commands, and its heading in the report.
      seconds: its limit. It gets what earlier parts left over as well, unless later ones need it.
      command: its process; the path of its records and the folder of the report are added as arguments.
      environment: variables that its process gets besides those of this one.
    """

    name: str
    title: str
    seconds: float
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run_parts(
    parts: Sequence[Part], output: Path, seconds: float, machine: Mapping[str, str], *, rehearsal: bool = False
) -> dict:
    """Runs the parts in order, and returns the report, which is also in `output`.

    A part that fails, crashes, or hangs until its limit is recorded as such, with the end of what it said. A part
    that would get less than half of its limit of what is left of all the `seconds` is left out.
    """
    end = time.monotonic() + seconds
    output.mkdir(parents=True, exist_ok=True)
    for old in ("log.txt", "report.json", "report.md", *(path.name for path in output.glob(f"*{recorder.SUFFIX}"))):
        (output / old).unlink(missing_ok=True)
    entries = [_entry(part, "waiting") for part in parts]
    found: dict[str, Any] = {"rehearsal": rehearsal, "seconds": seconds, "machine": dict(machine), "parts": entries}
    for place, part in enumerate(parts):
        left = end - time.monotonic()
        if left < part.seconds / 2:
            reason = f"It may take {part.seconds:.0f} s, and {max(left, 0):.0f} s were left."
            entries[place] = {**_entry(part, "left out"), "reason": reason}
            report.write(output, found)
            continue
        limit = min(left, max(part.seconds, left - sum(later.seconds for later in parts[place + 1 :])))
        entries[place] = {**_entry(part, "running"), "limit": limit}
        report.write(output, found)
        entries[place] = _run(part, limit, output)
        report.write(output, found)
    return found


def _entry(part: Part, status: str) -> dict[str, Any]:
    return {"name": part.name, "title": part.title, "status": status, "tables": [], "notes": []}


def _run(part: Part, limit: float, output: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpu_report-") as folder:
        records, said = Path(folder, "records.jsonl"), Path(folder, "said.txt")
        print(f"== {part.title} (at most {limit:.0f} s)", flush=True)
        start = time.monotonic()
        code = _finish([*part.command, str(records), str(output)], part.environment, limit, said)
        seconds = time.monotonic() - start
        entry = {**_entry(part, "done"), "seconds": seconds, "limit": limit, **recorder.read(records)}
        words = _end(said, LOG_CHARACTERS)
    with (output / "log.txt").open("a") as log:
        log.write(f"== {part.title}\n{words}\n")
    if code != 0:
        entry["status"] = "stopped at its limit" if code is None else "failed"
        entry["error"] = "\n".join([*FATAL.findall(words), words[-ERROR_CHARACTERS:]])
        if code is not None:
            entry["reason"] = f"It was ended by signal {-code}." if code < 0 else f"It ended with code {code}."
    print(f"   {entry['status']} after {seconds:.0f} s", flush=True)
    return entry


def _finish(command: Sequence[str], environment: Mapping[str, str], limit: float, said: Path) -> int | None:
    """Runs a command to its end and returns its code; None if it was killed at its limit."""
    surroundings = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with said.open("wb") as file, _started(command, surroundings, file) as process:
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return None


@contextlib.contextmanager
def _started(command: Sequence[str], environment: Mapping[str, str], file: Any) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, which is killed in the end with all that it has started."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(path: Path, characters: int) -> str:
    return path.read_text(errors="replace")[-characters:] if path.exists() else ""
