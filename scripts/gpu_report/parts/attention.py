"""Masked attention of a layer's queries: the kernel beside XLA and cuDNN, and the error of each against float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import time_calls

from gpu_report.compiled import compile_what_can_be, on_gpu
from gpu_report.recorder import COMPUTED, GIVEN, MEASURED, Recorder, milliseconds
from hpr_jax.ops.attention import attention

# (images, queries): HPR-DDQ's matching queries of one step of 4 views, and of 32.
CASES, HEADS, WIDTH = ((4, 950), (32, 950)), 8, 32
REPEATS, MOST_SECONDS = 10, 0.5
KERNEL = "Pallas kernel"


def run(recorder: Recorder, small: bool) -> None:
    for images, queries in ((1, 130),) if small else CASES:
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.normal(size=(images, queries, HEADS, WIDTH)), jnp.bfloat16) for _ in range(4)]
        selected = rng.random((images, queries)) < 0.5
        mask = jnp.asarray(selected[:, :, None] | selected[:, None, :])
        table = recorder.table(
            f"Attention: {images} x {queries} queries, bfloat16",
            {
                "implementation": GIVEN,
                **dict.fromkeys(("forward ms", "forward and backward ms"), MEASURED),
                "/ kernel": COMPUTED,
                "largest relative error of result and gradients": MEASURED,
            },
        )
        measure(recorder, table, arrays, mask)


def implementations() -> dict[str, Callable[..., jax.Array]]:
    """Functions of query, key, value and mask, by name."""
    kernel = "pallas" if on_gpu() else "pallas_interpret"

    def library(query: Any, key: Any, value: Any, mask: Any, name: Any) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation=name)

    return {
        KERNEL: functools.partial(attention, implementation=kernel),
        "XLA, probabilities again in the backward pass": functools.partial(attention, implementation="xla"),
        "XLA, probabilities kept": functools.partial(library, name="xla"),
        "cuDNN": functools.partial(library, name="cudnn"),
    }


def measure(recorder: Recorder, table: Any, arrays: list[jax.Array], mask: jax.Array) -> None:
    def both(function: Callable[..., jax.Array], *inputs: jax.Array) -> tuple[jax.Array, ...]:
        *arguments, gradient, mask = inputs
        out, back = jax.vjp(lambda *arguments: function(*arguments, mask), *arguments)
        return out, *back(gradient)

    functions: dict[tuple[str, str], Any] = {}
    for name, function in implementations().items():
        functions[name, "forward"] = jax.jit(function), (*arrays[:3], mask)
        functions[name, "both"] = jax.jit(functools.partial(both, function)), (*arrays, mask)
    programs, errors = compile_what_can_be(functions)
    for (name, kind), error in errors.items():
        if kind == "both":
            recorder.note(f"{name} does not run: {error}")
    with jax.default_matmul_precision("highest"):
        exact_of = jax.jit(functools.partial(both, implementations()["XLA, probabilities kept"]))
        exact = jax.device_get(exact_of(*(array.astype(jnp.float32) for array in arrays), mask))
    seconds = {}
    for name in implementations():
        if (name, "both") not in programs or (name, "forward") not in programs:
            continue
        calls = {
            kind: functools.partial(programs[name, kind].call, *functions[name, kind][1]) for kind in ("forward", "both")
        }
        forward, whole = (
            time_calls(call, jax.block_until_ready, REPEATS, most_seconds=MOST_SECONDS) for call in calls.values()
        )
        seconds[name] = whole.median
        found = [np.asarray(array, np.float32) for array in calls["both"]()]
        table.add(
            {
                "implementation": name,
                "forward ms": milliseconds(forward),
                "forward and backward ms": milliseconds(whole),
                "/ kernel": whole.median / seconds[KERNEL],
                "largest relative error of result and gradients": max(
                    float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)) for ours, theirs in zip(found, exact)
                ),
            }
        )
