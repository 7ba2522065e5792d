"""How fast rows are gathered from a table, and added to one, which bounds sampling and RoIAlign.

The kernels add weighted rows to random rows of a table, or sum random rows of one. Small tables fit the L2 cache, and
in very small ones many additions go to the same row.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import time_calls

from gpu_report.compiled import compile_all, on_gpu
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, milliseconds
from hpr_jax.kernels import weighted_rows as kernel
from hpr_jax.ops.weighted_rows import add_weighted_rows

TERMS = 16
REPEATS = 9


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of `rows` and what it stands for."""

    name: str
    rows: int
    channels: int


# Their sizes are those of 800x1333 images.
TABLES = (
    Table("encoder's values, 1 image", 22_223 * 8, 32),
    Table("encoder's values, 2 images", 2 * 22_223 * 8, 32),
    Table("encoder's values, 8 images", 8 * 22_223 * 8, 32),
    Table("coarsest level, 1 image", 273 * 8, 32),
    Table("RoIAlign's features, 4 views", 4 * 22_223, 256),
    Table("far larger than the cache", 8_000_000, 32),
)


def run(recorder: Recorder, small: bool) -> None:
    tables = [dataclasses.replace(table, rows=40) for table in TABLES[:1]] if small else TABLES
    measure(recorder, tables, rows=64 if small else 262_144)


def measure(recorder: Recorder, tables: Any, rows: int) -> None:
    """Measures additions and gathers of `rows * TERMS` rows of 32 channels, or of as many bytes in wider rows.

    Additions begin by clearing the table, which counts in their time, but not in their rate.
    """
    given = ("operation", "table", "MB", "type", "MB moved", "MB cleared")
    columns = {"kernel ms": MEASURED, "kernel GB/s": COMPUTED, "XLA ms": MEASURED, "XLA GB/s": COMPUTED}
    found = recorder.table("Kernel against XLA", {**dict.fromkeys(given, GIVEN), **columns, "kernel / XLA": COMPUTED})
    for table in tables:
        for operation, dtype, functions, inputs in operations(table, rows * 32 // table.channels):
            programs = compile_all({name: (jax.jit(function), inputs) for name, function in functions.items()})
            timings = {
                name: time_calls(
                    functools.partial(program.call, *inputs),
                    jax.block_until_ready,
                    REPEATS,
                    most_seconds=0.5,
                )
                for name, program in programs.items()
            }
            size = jnp.dtype(dtype).itemsize
            moved = rows * TERMS * 32 * size
            found.add(
                {
                    "operation": operation,
                    "table": table.name,
                    "MB": table.rows * table.channels * size / 1e6,
                    "type": dtype,
                    "MB moved": moved / 1e6,
                    "MB cleared": table.rows * table.channels * size / 1e6 if operation == "additions" else None,
                    **{f"{name} ms": milliseconds(timing) for name, timing in timings.items()},
                    **{f"{name} GB/s": moved / timing.median / 1e9 for name, timing in timings.items()},
                    "kernel / XLA": timings["kernel"].median / timings["XLA"].median,
                }
            )


def operations(table: Table, rows: int) -> Any:
    """Name, type of the table, functions by implementation, and their arguments."""
    rng = np.random.default_rng(0)
    index = jnp.asarray(rng.integers(0, table.rows, (rows, TERMS)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.5, 1.5, (rows, TERMS)), jnp.float32)
    gradient = jnp.asarray(rng.standard_normal((rows, table.channels), np.float32))
    interpret = not on_gpu()

    def add_kernel(index, weights, gradient):
        return kernel.backward(table.rows, index, weights, gradient, interpret=interpret)

    def add_xla(index, weights, gradient):
        return add_weighted_rows(jnp.zeros((table.rows, table.channels)), index, weights, gradient)

    yield "additions", "float32", {"kernel": add_kernel, "XLA": add_xla}, (index, weights, gradient)

    def gather_kernel(values, index, weights):
        return kernel.forward(values, index, weights, interpret=interpret)

    def gather_xla(values, index, weights):
        rows = values.at[index].get(mode="promise_in_bounds")
        return jnp.einsum("nk,nkc->nc", weights, rows.astype(jnp.float32)).astype(values.dtype)

    for dtype in ("bfloat16", "float32"):
        values = jax.random.normal(jax.random.key(0, impl="rbg"), (table.rows, table.channels), dtype)
        yield "gathers", dtype, {"kernel": gather_kernel, "XLA": gather_xla}, (values, index, weights)
