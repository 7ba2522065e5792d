"""Deformable sampling as a CUDA operator (`cuda_operator.cu`), which CuPy compiles, to compare the Pallas kernels with.

`results` takes and returns NumPy arrays. `runs` leaves the arrays on the device, for timing.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_suffix(".cu")
# Threads of a block: eight warps.
THREADS = 256
# The operator's heads have as many channels as a warp has threads.
WIDTH = 32
Levels = Sequence[tuple[int, int]]


def obstacle() -> str | None:
    """Why the operator cannot run on this machine, or None if it can."""
    if not importlib.util.find_spec("cupy"):
        return "CuPy is not installed"
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no GPU: {error}"
    return None


@functools.cache
def _kernels(dtype: str) -> dict[str, Any]:
    """The compiled kernels by direction, for values of this type."""
    import cupy

    options = ("--std=c++17", *(["-DVALUES_BFLOAT16"] if dtype == "bfloat16" else []))
    module = cupy.RawModule(code=SOURCE.read_text(), options=options)
    return {direction: module.get_function(direction) for direction in ("forward", "backward")}


def bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in the type that the operator reads: float32, or uint16 with the bits of bfloat16."""
    import ml_dtypes

    if dtype == "bfloat16":
        return np.asarray(array).astype(ml_dtypes.bfloat16).view(np.uint16)
    return np.asarray(array, np.float32)


def level_table(levels: Levels) -> np.ndarray:
    """int32 `[L, 3]`: height, width and first token of each level."""
    starts = np.cumsum([0, *(height * width for height, width in levels[:-1])])
    return np.array([(*shape, start) for shape, start in zip(levels, starts)], np.int32)


class _OnDevice:
    """The operator's arguments and results on the device."""

    def __init__(self, arrays: dict[str, np.ndarray], levels: Levels, dtype: str):
        import cupy

        batch, tokens, heads, width = arrays["value"].shape
        queries, points = arrays["weights"].shape[1], arrays["weights"].shape[-1]
        if width != WIDTH:
            raise ValueError(f"The CUDA operator takes heads of {WIDTH} channels, not of {width}.")
        self.kernels, self.warps = _kernels(dtype), batch * queries * heads
        sizes = map(np.int32, (batch, tokens, queries, heads, len(levels), points))
        self.value, self.gradient = (cupy.asarray(bits(arrays[name], dtype)) for name in ("value", "gradient"))
        self.locations, self.weights = (cupy.asarray(arrays[name], cupy.float32) for name in ("locations", "weights"))
        self.inputs = (*sizes, cupy.asarray(level_table(levels)), self.value, self.locations, self.weights)
        # NaN everywhere, so that elements which the operator does not write show.
        self.out = cupy.full((batch, queries, heads, width), np.nan, np.float32)
        if dtype == "bfloat16":
            self.out = cupy.full(self.out.shape, 0x7FC0, np.uint16)
        self.grad_value = cupy.zeros(arrays["value"].shape, np.float32)
        self.grad_locations = cupy.full(arrays["locations"].shape, np.nan, np.float32)
        self.grad_weights = cupy.full(arrays["weights"].shape, np.nan, np.float32)

    def forward(self) -> None:
        self._launch("forward", self.out)

    def backward(self) -> None:
        # The kernels that it is compared with clear the sums, too.
        self.grad_value.fill(0)
        self._launch("backward", self.gradient, self.grad_value, self.grad_locations, self.grad_weights)

    def _launch(self, direction: str, *others: Any) -> None:
        blocks = -(-self.warps * 32 // THREADS)
        self.kernels[direction]((blocks,), (THREADS,), (*self.inputs, *others))


def runs(arrays: dict[str, np.ndarray], levels: Levels, dtype: str) -> dict[str, Callable[[], None]]:
    """The calls to time, by direction, on arrays that are on the device already."""
    device = _OnDevice(arrays, levels, dtype)
    return {"forward": device.forward, "backward": device.backward}


def wait(_: object) -> None:
    """Returns when everything is computed."""
    import cupy

    cupy.cuda.Stream.null.synchronize()


def results(arrays: dict[str, np.ndarray], levels: Levels, dtype: str) -> tuple[np.ndarray, ...]:
    """The output, float32 `[B, Q, H, 32]`, and the gradients of value, locations and weights, float32, in their shapes."""
    import cupy
    import ml_dtypes

    device = _OnDevice(arrays, levels, dtype)
    device.forward()
    device.backward()
    out = cupy.asnumpy(device.out)
    if dtype == "bfloat16":
        out = out.view(ml_dtypes.bfloat16).astype(np.float32)
    return out, *(cupy.asnumpy(x) for x in (device.grad_value, device.grad_locations, device.grad_weights))
