"""Sampling and RoIAlign beside their peers: XLA's form, PyTorch's operators, and a CUDA operator of our own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from bench_common import time_calls
from bench_sampling import CASES, Case, Contestant, compulsory_bytes, contestants, make_arrays

from gpu_report import regions
from gpu_report.compiled import on_gpu
from gpu_report.device_time import device_seconds
from gpu_report.recorder import Recorder, milliseconds

DIRECTIONS = ("forward", "backward")
REPEATS, MOST_SECONDS = 15, 1.0
# The most valuable first.
SAMPLING = (
    ("encoder_2", "bfloat16"),
    ("decoder_900", "bfloat16"),
    ("encoder_8", "bfloat16"),
    ("encoder_2", "float32"),
)


def run(recorder: Recorder, small: bool) -> None:
    cases = SAMPLING[:1] if small else SAMPLING
    for place, (name, dtype) in enumerate(cases):
        case = Case(1, 9, ((4, 5), (2, 3))) if small else CASES[name]
        sampling(recorder, name, case, dtype)
        if place == 1 or small:
            boxes = regions.SMALL if small else regions.CASES["decoder_950"]
            roi_align(recorder, "decoder_950", boxes, dtype)


def sampling(recorder: Recorder, name: str, case: Case, dtype: str) -> None:
    size = jnp.dtype(dtype).itemsize
    title = f"Sampling, {name}, {dtype}: {case.images} x {case.rows} queries"
    arrays = make_arrays(case)
    floor = compulsory_bytes(case, size)
    race(recorder, title, contestants(case, arrays, dtype, interpret=not on_gpu()), floor)


def roi_align(recorder: Recorder, name: str, case: regions.Case, dtype: str) -> None:
    size = jnp.dtype(dtype).itemsize
    title = f"RoIAlign, {name}, {dtype}: {case.images} x {case.boxes} boxes"
    features, results = (
        case.images * case.tokens * case.channels,
        case.images * case.boxes * case.bins**2 * case.channels,
    )
    # Backward, sums are float32: cleared, written, and rounded.
    floor = {"forward": (features + results) * size, "backward": (features + results) * size + 2 * features * 4}
    arrays = regions.make_arrays(case)
    race(recorder, title, regions.contestants(case, arrays, dtype, interpret=not on_gpu()), floor)


def race(recorder: Recorder, title: str, entrants: Iterable[Contestant], floor: dict[str, int]) -> None:
    """A table with a row for each; ratios are to the first one, the kernel."""
    columns = {"measured": ("ms", "ms on device"), "computed": ("GB/s", "/ kernel")}
    table = recorder.table(
        title,
        given=["implementation"],
        **{kind: [f"{way} {name}" for way in DIRECTIONS for name in names] for kind, names in columns.items()},
    )
    recorder.note(
        f"{title}: compulsory traffic is {floor['forward'] / 1e6:.0f} MB forward and {floor['backward'] / 1e6:.0f} MB backward; "
        "GB/s is that over the time."
    )
    first: dict[str, float] = {}
    for entrant in entrants:
        if entrant.missing:
            recorder.note(f"{title}: {entrant.name} is left out, {entrant.missing}.")
            continue
        cells: dict[str, Any] = {"implementation": entrant.name}
        warm_up(entrant)
        for way, call in entrant.runs.items():
            timing = time_calls(call, entrant.wait, REPEATS, most_seconds=MOST_SECONDS)
            kernel = first.setdefault(way, timing.median)
            cells |= {
                f"{way} ms": milliseconds(timing),
                f"{way} GB/s": floor[way] / timing.median / 1e9,
                f"{way} / kernel": timing.median / kernel,
            }
            if entrant.name != "XLA":
                # XLA's forms are loops of thousands of kernels, which would make long traces.
                seconds = attempt(recorder, lambda entrant=entrant, call=call: device_seconds(entrant.library, call))
                cells[f"{way} ms on device"] = None if seconds is None else 1e3 * seconds
        table.add(cells)


def warm_up(entrant: Contestant) -> None:
    """Compiles all directions side by side."""
    if entrant.library == "jax":
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda call: jax.block_until_ready(call()), entrant.runs.values()))


def attempt(recorder: Recorder, measure: Callable[[], float | None]) -> float | None:
    """A number that the report can do without."""
    try:
        return measure()
    except Exception as error:
        recorder.note(f"Time on the device was not to be had: {type(error).__name__}: {error}".splitlines()[0])
        return None


