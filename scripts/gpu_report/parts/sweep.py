"""The kernels under other launch settings: warps of a program and channels of a thread."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from sampling import CASES, LAUNCHES, WIDTH, Case, kernel_calls, make_arrays
from timing import time_calls

from gpu_report import regions
from gpu_report.compiled import compile_what_can_be, on_gpu
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, milliseconds
from hpr_jax.kernels import deformable_sampling, weighted_rows
from hpr_jax.kernels.launch import Launch

REPEATS, MOST_SECONDS = 9, 0.3
DTYPE = "bfloat16"
REGION_LAUNCHES = tuple(Launch(warps, elements) for warps in (1, 2, 4, 8) for elements in (4, 8))


def run(recorder: Recorder, small: bool) -> None:
    case = Case(1, 9, ((4, 5), (2, 3))) if small else CASES["encoder_2"]
    calls = kernel_calls(case, make_arrays(case), DTYPE, interpret=not on_gpu())
    defaults = {"forward": deformable_sampling.FORWARD, "backward": deformable_sampling.BACKWARD}
    launches = tuple(defaults.values()) if small else LAUNCHES
    compare(recorder, f"Sampling, encoder_2, {DTYPE}", {launch: calls(launch) for launch in launches}, defaults, WIDTH)
    boxes = regions.SMALL if small else regions.CASES["decoder_950"]
    defaults = {"forward": weighted_rows.FORWARD, "backward": weighted_rows.BACKWARD}
    launches = tuple(defaults.values()) if small else REGION_LAUNCHES
    calls = region_calls(boxes)
    width = min(boxes.channels, weighted_rows.TILE)
    compare(
        recorder, f"RoIAlign's sums, decoder_950, {DTYPE}", {launch: calls(launch) for launch in launches}, defaults, width
    )


def compare(recorder: Recorder, title: str, calls: dict[Launch, Any], defaults: dict[str, Launch], width: int) -> None:
    """Adds a table with a row for each launch setting and direction. Ratios are to the direction's default setting."""
    table = recorder.table(
        title,
        {
            **dict.fromkeys(("direction", "warps", "channels a thread", "rows a program", "default"), GIVEN),
            "ms": MEASURED,
            "/ default": COMPUTED,
        },
    )
    for direction, default in defaults.items():
        by_launch = {launch: directions[direction] for launch, directions in calls.items()}
        functions = {launch: (jax.jit(function), inputs) for launch, (function, inputs) in by_launch.items()}
        programs, failures = compile_what_can_be(functions)
        for launch, error in failures.items():
            recorder.note(f"{title}, {direction}: {launch} does not compile: {error}")
        reference = None
        for launch in sorted(programs, key=lambda launch: launch != default):
            call = functools.partial(programs[launch].call, *by_launch[launch][1])
            timing = time_calls(call, jax.block_until_ready, REPEATS, most_seconds=MOST_SECONDS)
            if launch == default:
                reference = timing.median
            table.add(
                {
                    "direction": direction,
                    "warps": launch.num_warps,
                    "channels a thread": launch.elements,
                    "rows a program": launch.block(width),
                    "default": "yes" if launch == default else "",
                    "ms": milliseconds(timing),
                    "/ default": None if reference is None else timing.median / reference,
                }
            )


def region_calls(case: regions.Case) -> Any:
    """A function of a launch setting that gives, by direction, the kernel and its arguments.

    The rows that are summed are as many as RoIAlign's, and as near to one another.
    """
    terms, rows, table = 4 * case.ratio**2, case.images * case.boxes * case.bins**2, case.images * case.tokens
    start = jax.random.randint(jax.random.key(0, impl="rbg"), (rows, 1), 0, max(table - 200, 1))
    index = jnp.minimum(start + jnp.arange(terms) % 4 + jnp.arange(terms) // 4 * case.levels[0][1], table - 1).astype(
        jnp.int32
    )
    weights = jnp.full((rows, terms), 1 / terms, jnp.float32)
    features, gradient = (
        jax.random.normal(jax.random.key(seed, impl="rbg"), (size, case.channels), DTYPE)
        for seed, size in ((1, table), (2, rows))
    )
    interpret = not on_gpu()

    def of(launch: Launch) -> dict[str, Any]:
        forward = functools.partial(weighted_rows.forward, launch=launch, interpret=interpret)
        backward = functools.partial(weighted_rows.backward, table, launch=launch, interpret=interpret)
        return {"forward": (forward, (features, index, weights)), "backward": (backward, (index, weights, gradient))}

    return of
