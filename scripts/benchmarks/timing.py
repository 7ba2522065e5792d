"""What the benchmarks share: timing of calls, and peak memory."""

import dataclasses
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that a call took.

    Attributes:
      median: of all repeats.
      spread: half of the distance between the quartiles.
      repeats: number of timings.
    """

    median: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        low, median, high = np.percentile(seconds, (25, 50, 75))
        return cls(float(median), float(high - low) / 2, len(seconds))


def time_calls(
    run: Callable[[], Any], wait: Callable[[Any], Any], repeats: int, *, most_seconds: float = float("inf")
) -> Timing:
    """Times a call, after two calls that are not counted.

    A timing of a short call is that of several in a queue, up to 20 in about 50 ms, so that the time to launch them does not
    count on GPUs.

    Args:
      run: the call.
      wait: takes a result, and returns when it is computed.
      repeats: number of timings.
      most_seconds: no more timings begin after so many seconds, but three are taken in any case.
    """
    wait(run())
    start = time.perf_counter()
    wait(run())
    calls = max(1, min(20, int(0.05 / (time.perf_counter() - start))))
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < 3 or calls * sum(seconds) < most_seconds):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        wait(result)
        seconds.append((time.perf_counter() - start) / calls)
    return Timing.of(seconds)


def peak_memory() -> float:
    """Peak memory so far, of the GPU if there is one, else of this process, in GB."""
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"] / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which begins with the parent's memory.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
