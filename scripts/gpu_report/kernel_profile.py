"""Which kernels ran on the device, and for how long, read from a trace of JAX's profiler."""

import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or copy, and all of its runs in a trace.

    Attributes:
      operation: the operation of the compiled program that it belongs to; where the trace does not tell, its own name.
      name: its own name.
      runs, seconds: how often it ran, and how long all runs took together.
    """

    operation: str
    name: str
    runs: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What some calls of a program ran on the device.

    Attributes:
      kernels: the one that took longest comes first.
      busy: seconds in which something ran on the device.
      calls: how many were traced.
      raw: the trace as the profiler wrote it.
    """

    kernels: list[Kernel]
    busy: float
    calls: int
    raw: bytes

    @property
    def launches(self) -> float:
        """Kernels and copies per call."""
        return sum(kernel.runs for kernel in self.kernels) / self.calls


def profile(run: Callable[[], Any], calls: int) -> Profile:
    """Traces some calls of a function that is compiled already.

    Raises:
      ValueError: the trace has nothing of a device in it.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.block_until_ready(run())
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for _ in range(calls):
                result = run()
            jax.block_until_ready(result)
        finally:
            jax.profiler.stop_trace()
        raw = next(Path(folder).rglob("*.xplane.pb")).read_bytes()
    events = list(_device_events(jax.profiler.ProfileData.from_serialized_xspace(raw)))
    if not events:
        raise ValueError("the trace has nothing of a device in it")
    runs: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for *names, start, end in events:
        runs[names[0], names[1]].append(end - start)
    kernels = [Kernel(*names, len(times), sum(times)) for names, times in runs.items()]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Profile(kernels, _covered((start, end) for *_, start, end in events), calls, raw)


def _device_events(data: Any) -> Iterator[tuple[str, str, float, float]]:
    """Operation, kernel, start and end (seconds) of all that ran on the GPU's streams, or without a GPU on XLA's threads."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    for plane in planes or data.planes:
        for line in plane.lines:
            if planes and not line.name.startswith("Stream"):
                # The profiler adds lines of sums over the streams' events.
                continue
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if planes or operation:
                    start = event.start_ns / 1e9
                    # The innermost of nested operations comes last in the name.
                    inner = str(operation or event.name).rpartition("/")[2]
                    yield inner, event.name, start, start + event.duration_ns / 1e9


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def sources(program: str) -> dict[str, str]:
    """What the operations of a compiled program were in JAX, by their names in the program and by those of their kernels.

    What they were is `op_name` in the program's text, without its first part. A kernel has the name of its operation, with
    underscores in place of dots and hyphens.
    """
    found: dict[str, str] = {}
    for name, source in re.findall(r"%?([\w.-]+) = [^\n]*?op_name=\"([^\"]*)\"", program):
        short = source.partition("/")[2] or source
        found[name] = found[re.sub(r"[.-]", "_", name)] = short
    return found
