"""Tables of what a program ran on the device."""

from collections.abc import Callable
from typing import Any

from gpu_report.compiled import Program
from gpu_report.kernel_profile import Profile, profile, sources
from gpu_report.recorder import Recorder, Table

CALLS = 3
MOST_KERNELS = 25


def summary_table(recorder: Recorder, title: str) -> Table:
    """For the rows of `summarize`."""
    return recorder.table(
        title, given=["program"], measured=["kernels and copies a call", "ms busy a call", "us each"], computed=["share of time busy"]
    )


def summarize(
    recorder: Recorder, table: Table, name: str, run: Callable[[], Any], seconds: float, calls: int = CALLS
) -> Profile | None:
    """Adds a program's row; `seconds` is the time of a call without a trace. None if there is no trace."""
    try:
        found = profile(run, calls)
    except Exception as error:
        recorder.note(f"{name} has no profile: {type(error).__name__}: {error}".splitlines()[0])
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
    """The kernels that took most of the time, and what of the model they compute."""
    table = recorder.table(title, given=["kernel", "of"], measured=["runs a call", "ms a call"], computed=["share"])
    origins = sources(program.call.as_text() or "")
    total = sum(kernel.seconds for kernel in found.kernels)
    for kernel in found.kernels[:MOST_KERNELS]:
        table.add(
            {
                "kernel": kernel.operation[:60],
                "of": origins.get(kernel.operation, "")[-90:],
                "runs a call": kernel.runs / found.calls,
                "ms a call": 1e3 * kernel.seconds / found.calls,
                "share": kernel.seconds / total,
            }
        )
