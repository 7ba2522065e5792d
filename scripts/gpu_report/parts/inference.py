"""Inference of a full-size detector: time, memory, and the kernels that take most of the time."""

import functools
from typing import Any

import jax
from flax import nnx
from timing import peak_memory, time_calls

from gpu_report.compiled import Program, compile_all
from gpu_report.kernel_table import list_kernels, summarize, summary_table
from gpu_report.model import make_bench
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, Table, milliseconds
from hpr_jax.inference.detect import make_detect

BATCHES = (1, 8)
# Columns of `costs`.
COSTS = {"trace s": MEASURED, "compile s": MEASURED, "GB of arguments": COMPUTED, "GB of inner values": COMPUTED}
REPEATS, MOST_SECONDS = 20, 3.0


def run(recorder: Recorder, small: bool, dtype: str = "bfloat16") -> None:
    table = recorder.table(
        "Inference",
        {
            **dict.fromkeys(("type", "images"), GIVEN),
            "ms": MEASURED,
            "images/s": COMPUTED,
            **COSTS,
            "peak GB so far": MEASURED,
        },
    )
    profiles = summary_table(recorder, "Kernels of inference")
    measure(recorder, table, profiles, dtype, small)


def measure(recorder: Recorder, table: Table, profiles: Table, dtype: str, small: bool) -> None:
    """Adds rows for all batch sizes of one type. Their programs are compiled side by side."""
    batches = BATCHES[:1] if small else BATCHES
    bench = make_bench(small, dtype=dtype, batch=max(batches))
    graph, state = nnx.split(bench.detector)
    detect = make_detect(graph, bench.config.evaluate.detections)
    inputs = {batch: (state, bench.images[:batch], bench.targets.sizes[:batch]) for batch in batches}
    programs = compile_all({batch: (detect, arrays) for batch, arrays in inputs.items()})
    calls: dict[int, Any] = {}
    seconds: dict[int, float] = {}
    for batch, program in programs.items():
        calls[batch] = functools.partial(program.call, *inputs[batch])
        timing = time_calls(calls[batch], jax.block_until_ready, REPEATS, most_seconds=MOST_SECONDS)
        seconds[batch] = timing.median
        table.add(
            {
                "type": dtype,
                "images": batch,
                "ms": milliseconds(timing),
                "images/s": batch / timing.median,
                "peak GB so far": peak_memory(),
                **costs(program),
            }
        )
    for batch, program in programs.items():
        name = f"{dtype}, {batch} image{'s' * (batch > 1)}"
        found = summarize(recorder, profiles, name, calls[batch], seconds[batch])
        if found is None:
            continue
        list_kernels(recorder, f"Kernels by time: {name}", found, program)
        if batch == BATCHES[0]:
            recorder.keep(f"inference-{dtype}.xplane.pb", found.raw)
            recorder.keep(f"inference-{dtype}.hlo.txt", (program.call.as_text() or "").encode())


def costs(program: Program) -> dict[str, Any]:
    """The cells of the columns `COSTS`."""
    return {
        "trace s": program.trace_seconds,
        "compile s": program.compile_seconds,
        "GB of arguments": program.gigabytes["arguments"],
        "GB of inner values": program.gigabytes["inner values"],
    }
