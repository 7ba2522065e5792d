"""Time that an operation takes on the device, without the time in which the host starts it, which may be longer."""

from collections.abc import Callable
from typing import Any

from gpu_report.compiled import on_gpu
from gpu_report.kernel_profile import profile

CALLS = 10
# Passes over a gigabyte. They keep the device busy for some milliseconds, in which calls are queued behind them.
PASSES = 10


def device_seconds(library: str, run: Callable[[], Any]) -> float | None:
    """Seconds that a call keeps the device busy; None if they cannot be measured.

    For JAX they are read from a trace. For PyTorch and CuPy they lie between two events, before which the device is kept
    busy.

    Args:
      library: jax, torch or cupy.
      run: makes the call.
    """
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
