"""Times deformable sampling, forward and backward, at the sizes of a detector on an 800x1333 image.

    python scripts/benchmarks/sampling.py [--dtype bfloat16|float32] [--cases encoder_2,decoder_300,...] [--repeats 20]
        [--sweep]

Rows are implementations: XLA's; the Pallas kernel, on a GPU; PyTorch's grid_sample and the original CUDA operator of mmcv,
where these packages are installed. Times are medians; ratios are to XLA in the same run. The bandwidth counts compulsory
traffic alone: values, locations, weights and outputs, each read or written once. --sweep times the kernel under other
launch settings.
"""

import argparse
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hpr_jax.kernels import deformable_sampling as kernel
from hpr_jax.kernels.launch import Launch
from hpr_jax.ops.deformable_sampling import deformable_sampling

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
TOKENS = sum(height * width for height, width in LEVELS)
HEADS, WIDTH, POINTS = 8, 32, 4
# Numbers of images and of queries.
CASES = {
    "encoder_1": (1, TOKENS),
    "encoder_2": (2, TOKENS),
    "encoder_8": (8, TOKENS),
    "decoder_300": (2, 300),
    "decoder_900": (2, 900),
}


def make_arrays(batch: int, queries: int) -> dict[str, np.ndarray]:
    """Random values and weights, and locations around each query's own place, as a detector has them."""
    rng = np.random.default_rng(0)
    places = (batch, queries, HEADS, len(LEVELS), POINTS)
    centers = rng.uniform(size=(batch, queries, 1, 1, 1, 2))
    if queries == TOKENS:
        grids = [np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1) for h, w in LEVELS]
        centers = np.concatenate([grid.reshape(-1, 2) for grid in grids])[None, :, None, None, None]
    weights = rng.uniform(size=places)
    return {
        "value": rng.normal(size=(batch, TOKENS, HEADS, WIDTH)),
        "locations": centers + rng.normal(size=(*places, 2)) * 0.03,
        "weights": weights / weights.sum(axis=(-2, -1), keepdims=True),
        "gradient": rng.normal(size=(batch, queries, HEADS * WIDTH)),
    }


def compulsory_bytes(batch: int, queries: int, size: int) -> dict[str, int]:
    """Bytes that must be read or written, with values of `size` bytes: forward, and backward with sums in float32."""
    value, output = batch * TOKENS * HEADS * WIDTH, batch * queries * HEADS * WIDTH
    samples = batch * queries * HEADS * len(LEVELS) * POINTS
    return {
        "forward": (value + output) * size + samples * 12,
        # Values, output gradients and samples are read; gradients of samples and of values are written, the latter twice, as
        # they are set to zero first.
        "backward": (2 * value + output) * size + samples * 24 + 2 * value * 4,
    }


def median_ms(run: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    """Milliseconds of a call: the median of several timings, in each of which several calls are queued, so that the time to
    launch them does not count on GPUs."""
    wait(run())
    start = time.perf_counter()
    wait(run())
    calls = max(1, min(20, int(0.05 / (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        wait(result)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * float(np.median(times))


def jax_runs(arrays: dict[str, np.ndarray], dtype: str, implementation: str) -> dict[str, Callable[[], Any]]:
    """Runs by direction, of an implementation of this project."""
    value, gradient = (jnp.asarray(arrays[name], dtype) for name in ("value", "gradient"))
    locations, weights = (jnp.asarray(arrays[name], jnp.float32) for name in ("locations", "weights"))

    def sample(value, locations, weights):
        return deformable_sampling(value, LEVELS, locations, weights, implementation=implementation)

    forward = jax.jit(sample)
    backward = jax.jit(lambda gradient, *arguments: jax.vjp(sample, *arguments)[1](gradient))
    return {
        "forward": lambda: forward(value, locations, weights),
        "backward": lambda: backward(gradient, value, locations, weights),
    }


def torch_runs(arrays: dict[str, np.ndarray], dtype: str, original: bool) -> dict[str, Callable[[], Any]]:
    """Runs by direction, of PyTorch's grid_sample on each level, or of the original operator."""
    import torch
    from torch.nn.functional import grid_sample

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    value, gradient = (torch.tensor(arrays[name], dtype=kind, device=device) for name in ("value", "gradient"))
    # The original operator has one type for all; grid_sample's grid must have that of the values.
    locations, weights = (torch.tensor(arrays[name], dtype=kind, device=device) for name in ("locations", "weights"))
    inputs = [x.requires_grad_() for x in (value, locations, weights)]

    def by_grid_sample(value, locations, weights):
        batch, queries, heads, _, points, _ = locations.shape
        start = 0
        total: Any = 0.0
        for level, (height, width) in enumerate(LEVELS):
            table = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(batch * heads, WIDTH, height, width)
            grid = 2 * locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2) - 1
            sampled = grid_sample(table, grid, align_corners=False).view(batch, heads, WIDTH, queries, points)
            total = total + torch.einsum("bhdqp,bqhp->bqhd", sampled, weights[:, :, :, level])
            start += height * width
        return total.reshape(batch, queries, heads * WIDTH)

    def by_operator(value, locations, weights):
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

        shapes = torch.tensor(LEVELS, device=device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    sample = by_operator if original else by_grid_sample
    out = sample(*inputs)

    def forward():
        with torch.no_grad():
            return sample(*inputs)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, inputs, gradient.view_as(out), retain_graph=True),
    }


def torch_wait(_: Any) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def implementations(arrays: dict[str, np.ndarray], dtype: str) -> Iterator[tuple[str, dict, Callable]]:
    """The name of each implementation on this machine, its runs by direction, and how to wait for a result."""
    yield "XLA", jax_runs(arrays, dtype, "xla"), jax.block_until_ready
    if jax.default_backend() == "gpu":
        yield "Pallas kernel", jax_runs(arrays, dtype, "pallas"), jax.block_until_ready
    if importlib.util.find_spec("torch"):
        import torch

        yield "PyTorch grid_sample", torch_runs(arrays, dtype, original=False), torch_wait
        if torch.cuda.is_available() and importlib.util.find_spec("mmcv") and importlib.util.find_spec("mmcv._ext"):
            # The operator has no bfloat16.
            kind = "float16" if dtype == "bfloat16" else dtype
            yield f"CUDA operator ({kind})", torch_runs(arrays, kind, original=True), torch_wait


def sweep(arrays: dict[str, np.ndarray], dtype: str, repeats: int) -> None:
    """Prints times of the kernel by number of warps and channels a thread."""
    value = jnp.asarray(arrays["value"], dtype)
    locations, weights = (jnp.asarray(arrays[name], jnp.float32) for name in ("locations", "weights"))
    gradient = jnp.asarray(arrays["gradient"], dtype).reshape(*locations.shape[:3], WIDTH)
    print(f"{'warps':>6} {'channels a thread':>18} {'rows':>5} {'forward ms':>11} {'backward ms':>12}")
    for warps, elements in itertools.product((1, 2, 4, 8), (2, 4, 8, 16)):
        launch = Launch(warps, elements)
        forward = jax.jit(functools.partial(kernel.forward, spatial_shapes=LEVELS, launch=launch))
        backward = jax.jit(functools.partial(kernel.backward, spatial_shapes=LEVELS, launch=launch))
        times = [
            median_ms(functools.partial(forward, value, locations, weights), jax.block_until_ready, repeats),
            median_ms(functools.partial(backward, value, locations, weights, gradient), jax.block_until_ready, repeats),
        ]
        print(f"{warps:6} {elements:18} {launch.block(WIDTH):5} {times[0]:11.3f} {times[1]:12.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--cases", default=",".join(CASES if on_gpu else ("encoder_1", "decoder_900")))
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--sweep", action="store_true", help="time the kernel under other launch settings (GPU)")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {arguments.dtype}")
    for case in arguments.cases.split(","):
        if case not in CASES:
            parser.error(f"there is no case {case!r}; known are {', '.join(CASES)}")
        arrays = make_arrays(*CASES[case])
        floor = compulsory_bytes(*CASES[case], jnp.dtype(arguments.dtype).itemsize)
        print(f"\n{case}: {CASES[case][0]} images, {CASES[case][1]} queries; compulsory traffic forward", end=" ")
        print(f"{floor['forward'] / 1e6:.0f} MB, backward {floor['backward'] / 1e6:.0f} MB")
        print(f"{'':28} {'forward ms':>11} {'GB/s':>7} {'x XLA':>6} {'backward ms':>12} {'GB/s':>7} {'x XLA':>6}")
        first = None
        for name, runs, wait in implementations(arrays, arguments.dtype):
            times = {direction: median_ms(run, wait, arguments.repeats) for direction, run in runs.items()}
            first = first or times
            cells = []
            for direction, milliseconds in times.items():
                wide = 11 if direction == "forward" else 12
                rate, ratio = floor[direction] / milliseconds / 1e6, milliseconds / first[direction]
                cells.append(f"{milliseconds:{wide}.3f} {rate:7.1f} {ratio:6.2f}")
            print(f"{name:28}", *cells, flush=True)
        if arguments.sweep and on_gpu:
            sweep(arrays, arguments.dtype, arguments.repeats)


if __name__ == "__main__":
    main()
