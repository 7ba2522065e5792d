"""Tables of the kernels that a program ran on the device."""

from collections.abc import Callable
from typing import Any

from gpu_report.compiled import Program, in_a_line
from gpu_report.kernel_profile import Profile, profile, sources
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, Table

CALLS = 3
MOST_KERNELS = 20


def summary_table(recorder: Recorder, title: str) -> Table:
    """An empty table that `summarize` adds rows to."""
    measured = ("kernels and copies a call", "ms busy a call", "us each")
    return recorder.table(title, {"program": GIVEN, **dict.fromkeys(measured, MEASURED), "share of time busy": COMPUTED})


def summarize(
    recorder: Recorder, table: Table, name: str, run: Callable[[], Any], seconds: float, calls: int = CALLS
) -> Profile | None:
    """Traces a program and adds its row. Returns the profile, or None if no trace could be made.

    Args:
      run: calls the program.
      seconds: how long a call takes without a trace.
      calls: how many are traced.
    """
    try:
        found = profile(run, calls)
    except Exception as error:
        recorder.note(f"{name} has no profile: {in_a_line(error)}")
        return None
    busy = found.busy / calls
    table.add(
        {
            "program": name,
            "kernels and copies a call": found.launches,
            "ms busy a call": 1e3 * busy,
            "us each": 1e6 * busy / found.launches,
            "share of time busy": busy / seconds,
        }
    )
    return found


def list_kernels(recorder: Recorder, title: str, found: Profile, program: Program) -> None:
    """Adds a table of the kernels that took most of the time, with what they compute of the model."""
    table = recorder.table(
        title,
        {
            **dict.fromkeys(("operation", "kernel", "of"), GIVEN),
            "runs a call": MEASURED,
            "ms a call": MEASURED,
            "share": COMPUTED,
        },
    )
    origins = sources(program.call.as_text() or "")
    total = sum(kernel.seconds for kernel in found.kernels)
    for kernel in found.kernels[:MOST_KERNELS]:
        table.add(
            {
                "operation": kernel.operation,
                "kernel": "" if kernel.name == kernel.operation else kernel.name[:60],
                "of": origins.get(kernel.operation, "")[-90:],
                "runs a call": kernel.runs / found.calls,
                "ms a call": 1e3 * kernel.seconds / found.calls,
                "share": kernel.seconds / total,
            }
        )
