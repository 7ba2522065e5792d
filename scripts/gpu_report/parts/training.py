"""A training step of 4 views, two of each of two images: each of its programs by itself, with few and with many objects."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from timing import Timing, peak_memory, time_calls

from gpu_report.compiled import Compiler, Program
from gpu_report.kernel_table import list_kernels, summarize, summary_table
from gpu_report.model import make_bench
from gpu_report.parts.inference import COSTS, costs
from gpu_report.parts.selection import ROUNDING, excess
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, milliseconds
from hpr_jax.runtime.devices import replicate

# Both numbers of objects share a program: batches have room for as many as any image of a data set.
OBJECTS, ROOM = (7, 100), 100
REPEATS, MOST_SECONDS = 10, 2.0
RATE = 1e-4
# Row of the matching problems' solution on the host, which is not part of the step measured here.
SCIPY = "solve by SciPy"


def run(recorder: Recorder, small: bool) -> None:
    objects, room = ((1, 4), 4) if small else (OBJECTS, ROOM)
    bench = make_bench(small, dtype="bfloat16", batch=2, views=2, objects=objects[0], room=room)
    step, state, batch = bench.step()
    programs = compile_step(recorder, step, state, batch)
    for name, program in programs.items():
        setattr(step, "solve_on_device" if name == "solve" else name, program.call)
    times = recorder.table(
        "Training step: bfloat16, 2 images x 2 views",
        {
            **dict.fromkeys(("objects an image", "program"), GIVEN),
            "ms": MEASURED,
            "share of step": COMPUTED,
            "peak GB so far": MEASURED,
        },
    )
    run_of: dict[str, tuple[Callable[[], Any], Timing]] = {}
    for count in objects:
        apart = Apart(step, state, bench.batch_of(step, bench.targets_of(count)))
        run_of, state = measure(times, apart, count)
    profiles = summary_table(recorder, f"Kernels of a training step with {objects[-1]} objects")
    for name, (call, timing) in run_of.items():
        if name not in programs or name == "update":
            # SciPy's work is the host's, and an update gives its state away, so that it cannot run again.
            continue
        found = summarize(recorder, profiles, name, call, timing.median, calls=2)
        if found is not None:
            list_kernels(recorder, f"Kernels by time: {name}", found, programs[name])


def compile_step(recorder: Recorder, step: Any, state: Any, batch: Any) -> dict[str, Program]:
    """Compiles the programs of a step side by side, each for the shapes of what it gets from the others."""
    table = recorder.table(
        "Programs of a training step",
        {"program": GIVEN, **COSTS, "GB of results": COMPUTED},
    )
    variables, part = state.replace(optimizer=None, average=None), replicate(step.mesh, np.int32(0))
    with Compiler() as compiler:
        started = {}
        started["forward"], forward = compiler.start(step.forward, variables, batch, part)
        started["solve"], assigned = compiler.start(step.solve_on_device, forward.requests, forward.target_valid)
        started["loss"], (_, cotangents) = compiler.start(step.loss, batch, [forward.outputs], forward.denoising, [assigned])
        started["backward"], gradients = compiler.start(step.backward, variables, forward.pullback, cotangents[0])
        rate = replicate(step.mesh, np.float32(RATE))
        started["update"], _ = compiler.start(step.update, state, gradients, rate)
        programs = {}
        for name in sorted(started, key=("update", "solve", "loss", "forward", "backward").index):
            programs[name] = started[name].result()
            results = programs[name].gigabytes["results"]
            table.add({"program": name, **costs(programs[name]), "GB of results": results})
    recorder.note("Programs are compiled side by side, so that their times add up to more than it takes.")
    for name in ("forward", "backward"):
        recorder.keep(f"{name}.hlo.txt", (programs[name].call.as_text() or "").encode())
    return programs


@dataclasses.dataclass
class Apart:
    """A training step whose programs are called one by one."""

    step: Any
    state: Any
    batch: Any

    def __post_init__(self) -> None:
        self.part = replicate(self.step.mesh, np.int32(0))
        self.rate = replicate(self.step.mesh, np.float32(RATE))

    @property
    def variables(self) -> Any:
        return self.state.replace(optimizer=None, average=None)

    def forward(self) -> Any:
        return self.step.forward(self.variables, self.batch, self.part)

    def solve(self, forward: Any, *, on_device: bool) -> list[jax.Array]:
        self.step.solves_on_device = on_device
        return self.step.solve(forward.requests, forward.target_valid)

    def loss(self, forward: Any, assigned: Any) -> Any:
        return self.step.loss(self.batch, [forward.outputs], forward.denoising, [assigned])

    def backward(self, forward: Any, cotangent: Any) -> Any:
        return self.step.backward(self.variables, forward.pullback, cotangent)

    def update(self, gradients: Any) -> Any:
        self.state, norm = self.step.update(self.state, gradients, self.rate)
        return norm

    def whole(self) -> Any:
        self.state, numbers = self.step(self.state, self.batch, RATE)
        return numbers


def measure(table: Any, apart: Apart, objects: int) -> tuple[dict[str, tuple[Callable[[], Any], Timing]], Any]:
    """Adds rows for a step and its programs. Returns calls that can be made again, with their times, and the last state."""
    runs: dict[str, tuple[Callable[[], Any], Timing]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        timing = time_calls(call, jax.block_until_ready, REPEATS, most_seconds=MOST_SECONDS)
        runs[name] = call, timing
        peaks[name] = peak_memory()
        return call()

    peaks: dict[str, float] = {}
    forward = timed("forward", apart.forward)
    # A device array that was fetched keeps its copy on the host, so that each call needs a new one.
    fresh = [
        jax.block_until_ready([request.replace(cost=request.cost + 0.0) for request in forward.requests])
        for _ in range(REPEATS + 3)
    ]
    by_scipy = timed_solve(apart, forward, fresh, runs)
    peaks[SCIPY] = peak_memory()
    assigned = timed("solve", functools.partial(apart.solve, forward, on_device=True))
    for request, ours, theirs in zip(forward.requests, jax.device_get(assigned), jax.device_get(by_scipy)):
        more = excess(np.asarray(request.cost), ours, theirs)
        if more > ROUNDING:
            raise AssertionError(f"a matching by the kernel costs {more} more than SciPy's")
    numbers, cotangents = timed("loss", functools.partial(apart.loss, forward, assigned))
    gradients = timed("backward", functools.partial(apart.backward, forward, cotangents[0]))
    timed("update", functools.partial(apart.update, gradients))
    del gradients
    step = time_calls(apart.whole, jax.block_until_ready, REPEATS, most_seconds=MOST_SECONDS)
    runs["step"], peaks["step"] = (apart.whole, step), peak_memory()
    for name, (_, timing) in runs.items():
        share = timing.median / step.median
        cells = {"objects an image": objects, "program": name, "ms": milliseconds(timing)}
        table.add({**cells, "peak GB so far": peaks[name], "share of step": share})
    return runs, apart.state


def timed_solve(apart: Apart, forward: Any, fresh: list[Any], runs: dict[str, Any]) -> list[jax.Array]:
    """Times fetching the costs and solving by SciPy. Calls are not queued, since it is the host that works."""
    remaining = iter(fresh)

    def call() -> list[jax.Array]:
        return jax.block_until_ready(apart.solve(forward.replace(requests=next(remaining)), on_device=False))

    timing = time_one_by_one(call, REPEATS)
    runs[SCIPY] = call, timing
    return apart.solve(forward, on_device=False)


def time_one_by_one(call: Callable[[], Any], repeats: int) -> Timing:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)
