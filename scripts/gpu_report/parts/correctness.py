"""The kernels against float64, on random inputs of 12 seeds and at the sizes of a detector.

Memory is poisoned before each run, and every kernel runs twice: results that differ between the runs tell of a race.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cuda_operator
import jax
import jax.numpy as jnp
import numpy as np
from sampling import CASES, WIDTH, Case, make_arrays

from gpu_report import poison, reference, regions
from gpu_report.compiled import compile_all, on_gpu
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder
from hpr_jax.ops.deformable_sampling import deformable_sampling
from hpr_jax.ops.roi_align import roi_align

SEEDS = 12
# Limits of ‖computed - exact‖ / ‖exact‖. All is computed in float32, and results of narrower types are rounded once.
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
# The limit of the same between two runs in float32, which may add in different orders.
MOVED = 1e-6
FIELDS = ("output", "of value", "of locations", "of weights")
TYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
      name, dtype, shape: what the report says of it.
      function: from the inputs to output and gradients, in the order of `FIELDS`; it is jitted.
      inputs: its arguments.
      exact: computes the same in float64.
      peer: computes the same with the CUDA operator; None if that cannot.
    """

    name: str
    dtype: str
    shape: str
    function: Callable[..., Sequence[jax.Array]]
    inputs: tuple[jax.Array, ...]
    exact: Callable[[], Sequence[np.ndarray]]
    peer: Callable[[], Sequence[np.ndarray]] | None = None


def run(recorder: Recorder, small: bool) -> None:
    unwritten = poison.unwritten_numbers()
    recorder.note(f"Of {poison.LEFT_OUT} numbers that a kernel left out on purpose, {unwritten} were NaN; all have to be.")
    recorder.note(
        f"Right is: the relative error is at most {TOLERANCES}, all is finite, and between two runs of the same nothing "
        f"moved by more than {MOVED}, relatively; in narrower types, by what that turns of their roundings."
    )
    obstacle = cuda_operator.obstacle()
    if obstacle:
        recorder.note(f"The CUDA operator is not checked: {obstacle}.")
    seeds = 1 if small else SEEDS
    checks = [check for seed in range(seeds) for check in (sampling_of_seed(seed), regions_of_seed(seed))]
    checks += full_size(small)
    programs = compile_all({check.name: (jax.jit(check.function), check.inputs) for check in checks})
    table = recorder.table(
        "Relative errors, ‖computed - exact‖ / ‖exact‖",
        {
            **dict.fromkeys(("check", "shape"), GIVEN),
            **dict.fromkeys((*FIELDS, "moved", "not finite"), MEASURED),
            "verdict": COMPUTED,
        },
    )
    wrong = [] if unwritten == poison.LEFT_OUT else ["poisoning"]
    for check in checks:
        exact = check.exact()
        runs: dict[str, Callable[[], Sequence[Any]]] = {
            check.name: functools.partial(programs[check.name].call, *check.inputs)
        }
        if check.peer is not None:
            runs[f"CUDA operator, {check.name}"] = check.peer
        for name, compute in runs.items():
            cells, right = compare(compute, exact, check.dtype)
            table.add({"check": name, "shape": check.shape, **cells, "verdict": "right" if right else "WRONG"})
            wrong += [] if right else [name]
    if wrong:
        raise SystemExit(f"Wrong: {'; '.join(wrong)}.")


def compare(
    compute: Callable[[], Sequence[Any]], exact: Sequence[np.ndarray], dtype: str
) -> tuple[dict[str, float | int], bool]:
    """Runs something twice on poisoned memory; returns its errors, and whether they are small enough."""
    runs = []
    for _ in range(2):
        poison.poison([x.shape for x in exact])
        results = list(compute())
        runs.append([np.asarray(x, np.float64).reshape(y.shape) for x, y in zip(results, exact)])
    errors = [relative(x, y) for x, y in zip(runs[0], exact)]
    moved = [relative(x, y) for x, y in zip(runs[1], runs[0])]
    still = all(distance < may_move(str(x.dtype)) for distance, x in zip(moved, results))
    gaps = sum(int((~np.isfinite(x)).sum()) for x in (*runs[0], *runs[1]))
    right = gaps == 0 and still and all(error <= TOLERANCES[dtype] for error in errors)
    return {**dict(zip(FIELDS, errors)), "moved": max(moved), "not finite": gaps}, right


def may_move(dtype: str) -> float:
    """How far a result may be from that of another run, ‖difference‖ / ‖result‖.

    A sum that differs by m, relatively, is rounded to another number of a narrower type with probability m / eps, and is
    then eps away. The root of the mean square is the root of m * eps.
    """
    return MOVED if dtype == "float32" else float(np.sqrt(MOVED * float(jnp.finfo(dtype).eps)))


def relative(computed: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(computed - exact) / (np.linalg.norm(exact) + 1e-30))


def implementation() -> str:
    return "pallas" if on_gpu() else "pallas_interpret"


def full_size(small: bool) -> Iterator[Check]:
    """Checks at the sizes of a detector."""
    cases = (
        {"rehearsal": Case(1, 9, ((4, 5), (2, 3)))}
        if small
        else {name: CASES[name] for name in ("decoder_900", "encoder_1")}
    )
    for name, case in cases.items():
        for dtype in ("bfloat16", "float32"):
            yield sampling_check(name, dtype, case.levels, make_arrays(case))
    for dtype in ("bfloat16", "float32"):
        yield regions_check("decoder_950", dtype, regions.SMALL if small else regions.CASES["decoder_950"], seed=0)


def sampling_of_seed(seed: int) -> Check:
    """Shapes, type and values of one seed. Every third seed has all locations at one place, every fifth many outside."""
    rng = np.random.default_rng(seed)
    levels = tuple((int(h), int(w)) for h, w in rng.integers(1, 9, (rng.integers(1, 5), 2)))
    batch, queries, heads, points = (int(rng.integers(1, most)) for most in (4, 40, 5, 6))
    width = int(rng.choice([1, 3, 8, 16, 24, 32, 64]))
    places = (batch, queries, heads, len(levels), points)
    locations = rng.uniform(-0.4, 1.4, (*places, 2))
    if seed % 3 == 2:
        locations[:] = 0.45
    if seed % 5 == 4:
        locations[:, ::2] += 1000.0
    arrays = {
        "value": rng.normal(size=(batch, sum(h * w for h, w in levels), heads, width)),
        "locations": locations,
        "weights": rng.normal(size=places),
        "gradient": rng.normal(size=(batch, queries, heads * width)),
    }
    return sampling_check(f"seed {seed}", TYPES[seed % len(TYPES)], levels, arrays)


def sampling_check(name: str, dtype: str, levels: Any, arrays: dict[str, np.ndarray]) -> Check:
    """A check of sampling on arrays like those of `sampling.make_arrays`."""
    value, gradient = (jnp.asarray(arrays[key], dtype) for key in ("value", "gradient"))
    gradient = gradient.reshape(*arrays["weights"].shape[:3], -1)
    locations, weights = off_edges(arrays["locations"], levels), arrays["weights"].astype(np.float32)
    rounded = {"value": np.asarray(value, np.float32), "gradient": np.asarray(gradient, np.float32)}
    rounded |= {"locations": locations, "weights": weights}
    can = value.shape[-1] == WIDTH and dtype != "float16" and cuda_operator.obstacle() is None
    (batch, queries, heads), width, points = weights.shape[:3], value.shape[-1], weights.shape[-1]
    return Check(
        name=f"sampling, {name}, {dtype}",
        dtype=dtype,
        shape=f"{batch} x {queries} queries, {heads} heads of {width}, {len(levels)} levels, {points} points",
        function=functools.partial(sampled, levels),
        inputs=(value, jnp.asarray(locations), jnp.asarray(weights), gradient),
        exact=lambda: reference.deformable_sampling(rounded["value"], levels, locations, weights, rounded["gradient"]),
        peer=functools.partial(cuda_operator.results, rounded, levels, dtype) if can else None,
    )


def off_edges(locations: np.ndarray, levels: Sequence[tuple[int, int]]) -> np.ndarray:
    """Moves locations away from the middles of pixels, where their gradient jumps, and float32 and float64 would differ."""
    sizes = np.array([(width, height) for height, width in levels], np.float64)[:, None]
    pixels = locations * sizes - 0.5
    base = np.floor(pixels)
    return ((base + np.clip(pixels - base, 0.01, 0.99) + 0.5) / sizes).astype(np.float32)


def sampled(levels, value, locations, weights, gradient):
    """Output and gradients."""

    def sample(value, locations, weights):
        return deformable_sampling(value, levels, locations, weights, implementation=implementation())

    out, pullback = jax.vjp(sample, value, locations, weights)
    return out, *pullback(gradient.reshape(out.shape))


def regions_of_seed(seed: int) -> Check:
    rng = np.random.default_rng(100 + seed)
    case = dataclasses.replace(
        regions.SMALL,
        images=int(rng.integers(1, 4)),
        boxes=int(rng.integers(1, 20)),
        channels=int(rng.choice([1, 3, 16, 40, 256, 300])),
        bins=int(rng.integers(1, 8)),
    )
    return regions_check(f"seed {seed}", TYPES[seed % len(TYPES)], case, seed)


def regions_check(name: str, dtype: str, case: regions.Case, seed: int) -> Check:
    arrays = regions.make_arrays(case, seed)
    features, gradient = (jnp.asarray(arrays[key], dtype) for key in ("features", "gradient"))
    valid, boxes = arrays["valid"], arrays["boxes"]
    settings: dict[str, Any] = {
        "strides": case.strides,
        "bins": case.bins,
        "ratio": case.ratio,
        "finest_scale": case.finest_scale,
    }
    wide = (np.asarray(features, np.float64), np.asarray(gradient, np.float64))
    return Check(
        name=f"RoIAlign, {name}, {dtype}",
        dtype=dtype,
        shape=f"{case.images} x {case.boxes} boxes, {case.channels} channels, {case.bins} x {case.bins} bins",
        function=functools.partial(aligned, case),
        inputs=(features, jnp.asarray(valid), jnp.asarray(boxes), gradient),
        exact=lambda: reference.roi_align(wide[0], case.levels, valid, boxes, wide[1], **settings),
    )


def aligned(case, features, valid, boxes, gradient):
    """Output and gradient."""

    def align(features):
        return roi_align(features, case.levels, valid, boxes, implementation=implementation(), **case.settings)

    out, pullback = jax.vjp(align, features)
    return out, *pullback(gradient)
