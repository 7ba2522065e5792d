"""What selects by rank: the kernel that assigns queries to boxes beside SciPy, and that for NMS beside XLA's loops.

Survivors must be the same, and assignments as good: of two that cost the same, each solver may find another one.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Timing, time_calls

from gpu_report.compiled import compile_all, on_gpu
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, milliseconds
from hpr_jax.losses.matching import Request, solve_on_device, solve_on_host
from hpr_jax.ops.nms import nms_first, nms_mask

# (problems, images, boxes, queries, queries for a box): HPR-DDQ's matching and dense queries, all proposals of an image, and
# more boxes than queries.
ASSIGNMENTS = ((19, 4, 100, 900, 1), (19, 4, 100, 1350, 4), (1, 4, 100, 22223, 1), (6, 4, 400, 300, 1))
# (images, boxes, survivors): the choice among all proposals, and that between layers, where a survivor is any that is left.
SUPPRESSIONS = ((1, 22223, 900), (4, 22223, 900), (4, 950, None))
THRESHOLD = 0.8
# By so much may the costs of the two solvers' assignments differ: what a sum of hundreds of costs is rounded by in float64.
ROUNDING = 1e-9
REPEATS, MOST_SECONDS = 10, 1.0


def run(recorder: Recorder, small: bool) -> None:
    assignments = ((2, 1, 3, 9, 2),) if small else ASSIGNMENTS
    suppressions = ((1, 200, 20), (1, 150, None)) if small else SUPPRESSIONS
    wrong = assign(recorder, assignments) + suppress(recorder, suppressions)
    if wrong:
        raise AssertionError(f"results differ: {', '.join(wrong)}")


def timed(call: Callable[[], Any]) -> Timing:
    return time_calls(call, jax.block_until_ready, REPEATS, most_seconds=MOST_SECONDS)


def assign(recorder: Recorder, cases: tuple[tuple[int, ...], ...]) -> list[str]:
    """Returns names of cases where the kernel and SciPy differ."""
    table = recorder.table(
        "Assignment",
        {
            **dict.fromkeys(("problems", "boxes", "queries", "for a box", "costs"), GIVEN),
            **dict.fromkeys(("kernel ms", "SciPy ms, without transfers"), MEASURED),
            "SciPy / kernel": COMPUTED,
            **dict.fromkeys(("queries that differ", "costs more than SciPy's by"), MEASURED),
        },
    )
    wrong = []
    for problems, images, boxes, queries, repeats in cases:
        for name, make in (("independent", independent_costs), ("crowded", crowded_costs)):
            cost, valid = make(problems, images, boxes, queries), np.ones((problems, images, queries), bool)
            real, wanted = np.ones((images, boxes), bool), (repeats,) * problems
            request = Request(jnp.asarray(cost), jnp.asarray(valid), wanted)
            solve = functools.partial(solve_on_device, interpret=not on_gpu())
            (program,) = compile_all({name: (jax.jit(solve), ([request], jnp.asarray(real)))}).values()
            call = functools.partial(program.call, [request], jnp.asarray(real))
            start = time.perf_counter()
            (expected,) = solve_on_host([cost], [valid], real, [wanted])
            by_scipy, kernel = Timing.of([time.perf_counter() - start]), timed(call)
            assigned = np.asarray(call()[0])
            more = excess(cost, assigned, expected)
            wrong += [f"{boxes} boxes and {queries} queries, {name} costs"] if more > ROUNDING else []
            table.add(
                {
                    "problems": problems * images,
                    "boxes": boxes,
                    "queries": queries,
                    "for a box": repeats,
                    "costs": name,
                    "kernel ms": milliseconds(kernel),
                    "SciPy ms, without transfers": milliseconds(by_scipy),
                    "SciPy / kernel": by_scipy.median / kernel.median,
                    "queries that differ": int(np.sum(assigned != expected)),
                    "costs more than SciPy's by": more,
                }
            )
    return wrong


def excess(cost: np.ndarray, assigned: np.ndarray, expected: np.ndarray) -> float:
    """By how much an assignment costs more than another one, in the problem where that is most; infinite if the two do not
    assign as many queries.

    Args:
      cost: `[P, B, N, Q]`.
      assigned, expected: the index of each query's box, or -1: int32 `[P, B, Q]`.
    """

    def totals(boxes: np.ndarray) -> np.ndarray:
        chosen = np.take_along_axis(cost.astype(np.float64), np.maximum(boxes, 0)[:, :, None], axis=2)[:, :, 0]
        return np.sum(np.where(boxes >= 0, chosen, 0.0), axis=-1)

    if np.any(np.sum(assigned >= 0, axis=-1) != np.sum(expected >= 0, axis=-1)):
        return float("inf")
    return float(np.max(totals(assigned) - totals(expected)))


def independent_costs(*shape: int) -> np.ndarray:
    """Costs without any order; boxes seldom want the same query."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def crowded_costs(problems: int, images: int, boxes: int, queries: int) -> np.ndarray:
    """Distances of points, all boxes in a tenth of the picture, where they compete for the same queries."""
    rng = np.random.default_rng(0)
    at, place = rng.uniform(0, 0.1, (problems, images, boxes, 1, 2)), rng.uniform(size=(problems, images, 1, queries, 2))
    return np.linalg.norm(at - place, axis=-1).astype(np.float32)


def suppress(recorder: Recorder, cases: tuple[tuple[int, int, int | None], ...]) -> list[str]:
    """Returns names of cases where the kernel and XLA differ."""
    table = recorder.table(
        "NMS",
        {
            **dict.fromkeys(("images", "boxes", "survivors wanted", "overlaps"), GIVEN),
            **dict.fromkeys(("kernel ms", "XLA ms"), MEASURED),
            "XLA / kernel": COMPUTED,
            "survivors": MEASURED,
            "differ": MEASURED,
        },
    )
    wrong = []
    for images, number, count in cases:
        for name, make in (("clusters", clustered_boxes), ("chain", chained_boxes)):
            boxes, scores = make(images, number)
            programs = {}
            for implementation in ("xla", "pallas" if on_gpu() else "pallas_interpret"):

                def select(boxes, scores, implementation=implementation, count=count):
                    arguments = boxes, scores, jnp.ones(len(scores), bool)
                    if count is None:
                        return nms_mask(*arguments, THRESHOLD, implementation=implementation)
                    index, found = nms_first(*arguments, count, THRESHOLD, implementation=implementation)
                    return jnp.where(found, index, -1)

                programs[implementation] = (jax.jit(jax.vmap(select)), (boxes, scores))
            xla, kernel = [functools.partial(program.call, boxes, scores) for program in compile_all(programs).values()]
            expected, got = np.asarray(xla()), np.asarray(kernel())
            differ = int(np.sum(expected != got))
            wrong += [f"NMS of {number} boxes, {name}"] if differ else []
            by_xla, by_kernel = timed(xla), timed(kernel)
            table.add(
                {
                    "images": images,
                    "boxes": number,
                    "survivors wanted": count,
                    "overlaps": name,
                    "kernel ms": milliseconds(by_kernel),
                    "XLA ms": milliseconds(by_xla),
                    "XLA / kernel": by_xla.median / by_kernel.median,
                    "survivors": int(np.sum(got > 0) if count is None else np.sum(got >= 0)),
                    "differ": differ,
                }
            )
    return wrong


def clustered_boxes(images: int, number: int) -> tuple[jax.Array, jax.Array]:
    """Boxes around one in three as many objects, and scores."""
    rng = np.random.default_rng(0)
    object_of = rng.integers(0, max(number // 3, 1), (images, number))
    center, side = rng.uniform(0, 1000, (images, number, 2)), rng.uniform(10, 200, (images, number, 2))
    center, side = [np.take_along_axis(x, object_of[..., None], axis=1) for x in (center, side)]
    center = center + rng.normal(size=center.shape) * side * 0.05
    boxes = np.concatenate([center - side / 2, center + side / 2], axis=-1)
    return jnp.asarray(boxes, jnp.float32), jnp.asarray(rng.random((images, number)), jnp.float32)


def chained_boxes(images: int, number: int) -> tuple[jax.Array, jax.Array]:
    """Each box suppresses the next one, and that would suppress the one after it: the longest chain there is."""
    left = np.broadcast_to(np.arange(number), (images, number))
    boxes = np.stack([left, left * 0, left + 15, left * 0 + 15], axis=-1)
    return jnp.asarray(boxes, jnp.float32), jnp.asarray(-left, jnp.float32)
