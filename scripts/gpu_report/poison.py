"""Fills the device's memory with NaN, so that numbers that a kernel forgets to write are seen in its results."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt

from gpu_report.compiled import on_gpu
from hpr_jax.kernels.launch import Launch, pallas_call

# The share of the free memory that is filled.
SHARE = 0.7
# How many numbers the kernel of `unwritten_numbers` leaves out.
LEFT_OUT = 512


def poison(shapes: Sequence[tuple[int, ...]]) -> None:
    """Leaves NaN in most of the free memory, and in blocks of the sizes of these shapes, which JAX reuses first for them."""
    statistics = jax.devices()[0].memory_stats() or {}
    arrays = []
    if "bytes_limit" in statistics:
        free = statistics["bytes_limit"] - statistics["bytes_in_use"]
        # Whole gigabytes, so that few programs are compiled.
        arrays.append(_filler(int(SHARE * free / 2**30))())
    for shape in shapes:
        for dtype in (np.float32, jnp.bfloat16):
            arrays += [jax.device_put(np.full(shape, np.nan, dtype)) for _ in range(2)]
    jax.block_until_ready(arrays)
    for array in arrays:
        array.delete()


@functools.cache
def _filler(gigabytes: int) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.full((gigabytes, 2**28), jnp.nan, jnp.float32))


def unwritten_numbers() -> int:
    """Runs a kernel that writes every other one of 1024 numbers on poisoned memory, and counts the NaNs in its result."""

    def write_half(_, out):
        index = jnp.arange(2 * LEFT_OUT)
        plt.store(out.at[index], jnp.zeros(index.shape, jnp.float32), mask=index % 2 == 0)

    call = pallas_call(
        write_half,
        out_shape=[((2 * LEFT_OUT,), jnp.float32)],
        grid=(1,),
        launch=Launch(num_warps=1, elements=4),
        interpret=not on_gpu(),
        name="write_half",
    )
    nothing = jnp.zeros(1)
    program = jax.jit(call).lower(nothing).compile()
    poison([(2 * LEFT_OUT,)])
    (out,) = program(nothing)
    return int(np.isnan(np.asarray(out)).sum())
