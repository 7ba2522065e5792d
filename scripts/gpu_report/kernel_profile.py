"""What ran on the device, kernel by kernel, out of a trace of JAX's profiler."""

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
      operation: of the compiled program, where the trace tells; else the kernel's own name.
      name: the kernel's own.
      seconds: of all runs together.
    """

    operation: str
    name: str
    runs: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of some calls of a program.

    Attributes:
      kernels: by time, the longest first.
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
        """Kernels and copies of a call."""
        return sum(kernel.runs for kernel in self.kernels) / self.calls


def profile(run: Callable[[], Any], calls: int) -> Profile:
    """Traces calls of something that is compiled already.

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
    """Operation, kernel, start and end in seconds of all that the GPU's streams ran, or without a GPU XLA's threads."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    for plane in planes or data.planes:
        for line in plane.lines:
            if planes and not line.name.startswith("Stream"):
                # Sums that the profiler makes of the streams' events.
                continue
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if planes or operation:
                    start = event.start_ns / 1e9
                    # Of nested operations the innermost.
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
    """From names of operations in the text of a compiled program to what they were in JAX: `op_name` without its first part.
    Kernels are named like the operations, with underscores."""
    found: dict[str, str] = {}
    for name, source in re.findall(r"%?([\w.-]+) = [^\n]*?op_name=\"([^\"]*)\"", program):
        short = source.partition("/")[2] or source
        found[name] = found[re.sub(r"[.-]", "_", name)] = short
    return found
