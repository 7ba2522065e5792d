"""Time on the device alone, without what the host takes to start a call: for operations shorter than that."""

from collections.abc import Callable
from typing import Any

from gpu_report.compiled import on_gpu
from gpu_report.kernel_profile import profile

CALLS = 10
# Passes over a gigabyte that keep the device busy while calls are queued behind them, some milliseconds.
PASSES = 10


def device_seconds(library: str, run: Callable[[], Any]) -> float | None:
    """Of a call: for JAX out of a trace, for PyTorch and CuPy between two events with the device busy before the first; None
    where neither is to be had."""
    if library == "jax":
        found = profile(run, CALLS)
        return found.busy / CALLS
    if not on_gpu():
        return None
    if library == "torch":
        import torch

        busy = torch.ones(2**28, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def elapsed() -> float:
            return start.elapsed_time(end)
    else:
        import cupy

        busy = cupy.ones(2**28, cupy.float32)
        start, end = (cupy.cuda.Event() for _ in range(2))

        def elapsed() -> float:
            return cupy.cuda.get_elapsed_time(start, end)

    for _ in range(PASSES):
        busy *= 1.0
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return elapsed() / 1e3 / CALLS
