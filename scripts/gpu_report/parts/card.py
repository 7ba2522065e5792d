"""What the card can do at best: copies, launches, matrix products, transfers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from timing import Timing, time_calls

from gpu_report.compiled import in_a_line, on_gpu
from gpu_report.kernel_profile import profile
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, milliseconds

REPEATS = 9


def run(recorder: Recorder, small: bool) -> None:
    device = jax.devices()[0]
    recorder.note(f"JAX sees {device.device_kind} ({device.platform}), {len(jax.devices())} in all.")
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        recorder.note(f"JAX may take {limit / 1e9:.1f} GB of its memory in this part.")
    copies(recorder, (1, 4) if small else (32, 512, 4096))
    launches(recorder, 8 if small else 256)
    products(recorder, 128 if small else 8192)
    transfers(recorder, 1 if small else 64)


def copies(recorder: Recorder, megabytes: tuple[int, ...]) -> None:
    table = recorder.table("Copies", {"array MB": GIVEN, "ms": MEASURED, "GB/s read and written": COMPUTED})
    copy = jax.jit(lambda x: -x)
    for size in megabytes:
        x = jnp.ones((size, 250_000), jnp.float32)
        timing = time_calls(functools.partial(copy, x), jax.block_until_ready, REPEATS)
        rate = 2 * x.nbytes / timing.median / 1e9
        table.add({"array MB": size, "ms": milliseconds(timing), "GB/s read and written": rate})


def launches(recorder: Recorder, count: int) -> None:
    """Times to start a program, to start a small kernel in a program, and to wait for a result."""
    table = recorder.table("Launches", {"what": GIVEN, "ms": MEASURED, "us each": COMPUTED})

    def steps(number: int) -> Callable[[jax.Array], jax.Array]:
        def chain(x: jax.Array) -> jax.Array:
            # The compiler joins no two matrix products in one kernel.
            for _ in range(number):
                x = jnp.matmul(x, matrix)
            return x

        return jax.jit(chain)

    matrix = jax.random.normal(jax.random.key(0, impl="rbg"), (128, 128)) / 12
    x = jnp.ones((128, 128), jnp.float32)

    def add(what: str, timing: Timing | None, each: float) -> None:
        table.add({"what": what, "ms": None if timing is None else milliseconds(timing), "us each": 1e6 * each})

    one, few, many = (steps(number) for number in (1, count, 2 * count))
    queued = time_calls(lambda: one(x), jax.block_until_ready, REPEATS)
    add("program of one small product, queued", queued, queued.median)
    waited = time_calls(lambda: jax.block_until_ready(one(x)), jax.block_until_ready, REPEATS)
    add("program of one small product, waited for", waited, waited.median)
    short, long = (time_calls(functools.partial(run, x), jax.block_until_ready, REPEATS) for run in (few, many))
    add(f"program of {2 * count} small products", long, long.median / (2 * count))
    add("a small product more in a program", None, (long.median - short.median) / count)
    try:
        traced = profile(functools.partial(many, x), calls=1).launches
        recorder.note(f"A trace shows {traced:.0f} kernels in the program of {2 * count} small products.")
    except Exception as error:
        recorder.note(f"There is no trace of the kernels of a program: {in_a_line(error)}")


def products(recorder: Recorder, size: int) -> None:
    """Matrix products of random numbers, and how exact they are."""
    columns = {"size": GIVEN, "type": GIVEN, "precision": GIVEN, "ms": MEASURED, "TFLOP/s": COMPUTED}
    table = recorder.table("Matrix products", {**columns, "relative error": MEASURED})
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    expected = left[:16].astype(np.float64) @ right.astype(np.float64)
    for dtype, precision in (("bfloat16", "default"), ("float32", "default"), ("float32", "highest")):
        arrays = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
        multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
        timing = time_calls(functools.partial(multiply, *arrays), jax.block_until_ready, 5)
        error = np.linalg.norm(np.asarray(multiply(*arrays)[:16], np.float64) - expected) / np.linalg.norm(expected)
        table.add(
            {
                "size": size,
                "type": dtype,
                "precision": precision,
                "ms": milliseconds(timing),
                "relative error": float(error),
                "TFLOP/s": 2 * size**3 / timing.median / 1e12,
            }
        )


def transfers(recorder: Recorder, megabytes: int) -> None:
    """Transfers between host and device, as matching and loading make them."""
    if not on_gpu():
        recorder.note("Transfers are left out: without a GPU, there are none.")
        return
    table = recorder.table("Transfers", {"what": GIVEN, "ms": MEASURED, "GB/s": COMPUTED})
    add = jax.jit(lambda x: x + 1.0)

    def fetched(x: jax.Array) -> np.ndarray:
        # A device array that was fetched keeps its copy on the host, so that a new one is needed each time.
        return jax.device_get(add(x))

    for what, size in (("4 kB", 1024), (f"{megabytes} MB", megabytes * 250_000)):
        host = np.ones(size, np.float32)
        x = jnp.asarray(host)
        there = time_calls(functools.partial(jax.device_put, host), jax.block_until_ready, REPEATS)
        table.add({"what": f"{what} to the device", "ms": milliseconds(there), "GB/s": host.nbytes / there.median / 1e9})
        back = time_calls(functools.partial(fetched, x), lambda _: None, REPEATS)
        table.add(
            {"what": f"{what} computed and fetched", "ms": milliseconds(back), "GB/s": host.nbytes / back.median / 1e9}
        )
