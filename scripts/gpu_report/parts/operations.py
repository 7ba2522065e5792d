"""Sampling and RoIAlign beside their peers: XLA's form, PyTorch's operators, and a CUDA operator of our own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from sampling import CASES, Case, Contestant, compulsory_bytes, contestants, make_arrays
from timing import time_calls

from gpu_report import regions
from gpu_report.compiled import in_a_line, on_gpu
from gpu_report.device_time import device_seconds
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, milliseconds, number

DIRECTIONS = ("forward", "backward")
REPEATS, MOST_SECONDS = 15, 1.0
# The most valuable case comes first.
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
    # The backward pass adds in float32: sums are cleared, written, and rounded.
    floor = {"forward": (features + results) * size, "backward": (features + results) * size + 2 * features * 4}
    arrays = regions.make_arrays(case)
    race(recorder, title, regions.contestants(case, arrays, dtype, interpret=not on_gpu()), floor)


def race(recorder: Recorder, title: str, entrants: Iterable[Contestant], floor: dict[str, int]) -> None:
    """Adds a table with a row for each implementation. Ratios are to the first one, the kernel."""
    kinds = {"ms": MEASURED, "/ kernel": COMPUTED, "GB/s": COMPUTED, "ms on device": MEASURED}
    columns = {f"{way} {name}": kind for way in DIRECTIONS for name, kind in kinds.items()}
    table = recorder.table(title, {"implementation": GIVEN, **columns})
    recorder.note(
        f"{title}: GB/s is compulsory traffic over the time, {number(floor['forward'] / 1e6)} MB forward and "
        f"{number(floor['backward'] / 1e6)} MB backward."
    )
    first: dict[str, float] = {}
    for entrant in entrants:
        missing = entrant.missing
        if not missing:
            try:
                table.add({"implementation": entrant.name, **measure(recorder, entrant, floor, first)})
            except Exception as error:
                missing = f"it failed: {in_a_line(error)}"
        if missing:
            recorder.note(f"{title}: {entrant.name} is left out, {missing}.")


def measure(recorder: Recorder, entrant: Contestant, floor: dict[str, int], first: dict[str, float]) -> dict[str, Any]:
    """The cells of one implementation; `first` holds the times of the first one, by direction."""
    runs = entrant.make()
    if entrant.library == "jax":
        # Compiles both directions side by side.
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda call: jax.block_until_ready(call()), runs.values()))
    cells: dict[str, Any] = {}
    for way, call in runs.items():
        timing = time_calls(call, entrant.wait, REPEATS, most_seconds=MOST_SECONDS)
        cells |= {
            f"{way} ms": milliseconds(timing),
            f"{way} / kernel": timing.median / first.setdefault(way, timing.median),
            f"{way} GB/s": floor[way] / timing.median / 1e9,
        }
        # The XLA implementations are loops of thousands of kernels, whose traces would be long.
        if entrant.name != "XLA":
            cells[f"{way} ms on device"] = milliseconds_on_device(recorder, entrant, call)
    return cells


def milliseconds_on_device(recorder: Recorder, entrant: Contestant, call: Callable[[], Any]) -> float | None:
    """Time of a call on the device; None, with a note, if it cannot be measured."""
    try:
        seconds = device_seconds(entrant.library, call)
    except Exception as error:
        recorder.note(f"{entrant.name}: time on the device was not to be had: {in_a_line(error)}")
        return None
    return None if seconds is None else 1e3 * seconds
