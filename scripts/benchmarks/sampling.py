"""Times deformable sampling, forward and backward, at the sizes of a detector on an 800x1333 image.

    python scripts/benchmarks/sampling.py [--dtype bfloat16|float32] [--cases encoder_2,decoder_300,...] [--repeats 20]
        [--sweep]

Rows are implementations: the Pallas kernel, on a GPU; XLA's; PyTorch's grid_sample, the original CUDA operator of mmcv, and
a CUDA operator of our own, where PyTorch, mmcv and CuPy are installed. Times are medians; ratios are to XLA in the same
run. The bandwidth counts compulsory traffic alone: values, locations, weights and outputs, each read or written once.
--sweep times the kernel under other launch settings.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import cuda_operator
import jax
import jax.numpy as jnp
import numpy as np
from timing import time_calls

from hpr_jax.kernels import deformable_sampling as kernel
from hpr_jax.kernels.launch import Launch
from hpr_jax.ops.deformable_sampling import deformable_sampling

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
HEADS, WIDTH, POINTS = 8, 32, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one use of sampling.

    Attributes:
      images: number of images.
      queries: of an image; None stands for one for each token, as in the encoder.
      levels: (height, width) of each level's map.
    """

    images: int
    queries: int | None = None
    levels: tuple[tuple[int, int], ...] = LEVELS

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.levels)

    @property
    def rows(self) -> int:
        """Queries of an image."""
        return self.tokens if self.queries is None else self.queries


CASES = {
    "encoder_1": Case(1),
    "encoder_2": Case(2),
    "encoder_8": Case(8),
    "decoder_300": Case(2, 300),
    "decoder_900": Case(2, 900),
}

# The calls to time, by direction.
Runs = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An implementation of sampling, or of another operation.

    Attributes:
      name: for the table.
      library: a key of `WAITS`, which says how to wait for a result.
      make: puts the arrays on the device, and returns the calls to time.
      missing: why the implementation cannot run on this machine, or "" if it can.
    """

    name: str
    library: str = "jax"
    make: Callable[[], Runs] = dict
    missing: str = ""

    def wait(self, result: Any) -> None:
        """Returns when a result is computed."""
        WAITS[self.library](result)


def make_arrays(case: Case) -> dict[str, np.ndarray]:
    """Random values and weights, and locations around each query's own place, as a detector has them."""
    rng = np.random.default_rng(0)
    places = (case.images, case.rows, HEADS, len(case.levels), POINTS)
    centers = rng.uniform(size=(case.images, case.rows, 1, 1, 1, 2))
    if case.queries is None:
        grids = [np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1) for h, w in case.levels]
        centers = np.concatenate([grid.reshape(-1, 2) for grid in grids])[None, :, None, None, None]
    weights = rng.uniform(size=places)
    return {
        "value": rng.normal(size=(case.images, case.tokens, HEADS, WIDTH)),
        "locations": centers + rng.normal(size=(*places, 2)) * 0.03,
        "weights": weights / weights.sum(axis=(-2, -1), keepdims=True),
        "gradient": rng.normal(size=(case.images, case.rows, HEADS * WIDTH)),
    }


def compulsory_bytes(case: Case, size: int) -> dict[str, int]:
    """Bytes that must be read or written, with values of `size` bytes: forward, and backward with sums in float32."""
    value, output = case.images * case.tokens * HEADS * WIDTH, case.images * case.rows * HEADS * WIDTH
    samples = case.images * case.rows * HEADS * len(case.levels) * POINTS
    return {
        "forward": (value + output) * size + samples * 12,
        # Values, output gradients and samples are read; gradients of samples and of values are written, the latter twice, as
        # they are set to zero first.
        "backward": (2 * value + output) * size + samples * 24 + 2 * value * 4,
    }


def jax_runs(case: Case, arrays: dict[str, np.ndarray], dtype: str, implementation: str) -> Runs:
    """An implementation of this project, by its name in `hpr_jax.ops`."""
    value, gradient = (jnp.asarray(arrays[name], dtype) for name in ("value", "gradient"))
    locations, weights = (jnp.asarray(arrays[name], jnp.float32) for name in ("locations", "weights"))

    def sample(value, locations, weights):
        return deformable_sampling(value, case.levels, locations, weights, implementation=implementation)

    forward = jax.jit(sample)
    backward = jax.jit(lambda gradient, *arguments: jax.vjp(sample, *arguments)[1](gradient))
    return {
        "forward": lambda: forward(value, locations, weights),
        "backward": lambda: backward(gradient, value, locations, weights),
    }


def torch_runs(case: Case, arrays: dict[str, np.ndarray], dtype: str, original: bool) -> Runs:
    """PyTorch's grid_sample on each level, or the original operator."""
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
        for level, (height, width) in enumerate(case.levels):
            table = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(batch * heads, WIDTH, height, width)
            grid = 2 * locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2) - 1
            sampled = grid_sample(table, grid, align_corners=False).view(batch, heads, WIDTH, queries, points)
            total = total + torch.einsum("bhdqp,bqhp->bqhd", sampled, weights[:, :, :, level])
            start += height * width
        return total.reshape(batch, queries, heads * WIDTH)

    def by_operator(value, locations, weights):
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

        shapes = torch.tensor(case.levels, device=device)
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


WAITS: dict[str, Callable[[Any], Any]] = {"jax": jax.block_until_ready, "torch": torch_wait, "cupy": cuda_operator.wait}


def contestants(case: Case, arrays: dict[str, np.ndarray], dtype: str, *, interpret: bool = False) -> Iterator[Contestant]:
    """All implementations of sampling, the kernel first.

    Args:
      interpret: without a GPU, interprets the kernel, which says nothing about its speed.
    """
    if jax.default_backend() == "gpu":
        yield Contestant("Pallas kernel", make=functools.partial(jax_runs, case, arrays, dtype, "pallas"))
    elif interpret:
        yield Contestant("Pallas kernel", make=functools.partial(jax_runs, case, arrays, dtype, "pallas_interpret"))
    else:
        yield Contestant("Pallas kernel", missing="there is no NVIDIA GPU")
    yield cuda_contestant(case, arrays, dtype)
    yield from torch_contestants(case, arrays, dtype)
    yield Contestant("XLA", make=functools.partial(jax_runs, case, arrays, dtype, "xla"))


def cuda_contestant(case: Case, arrays: dict[str, np.ndarray], dtype: str) -> Contestant:
    name, obstacle = "CUDA operator of our own", cuda_operator.obstacle()
    if obstacle:
        return Contestant(name, "cupy", missing=obstacle)
    return Contestant(name, "cupy", functools.partial(cuda_operator.runs, arrays, case.levels, dtype))


def torch_contestants(case: Case, arrays: dict[str, np.ndarray], dtype: str) -> Iterator[Contestant]:
    if not importlib.util.find_spec("torch"):
        yield Contestant("PyTorch grid_sample", "torch", missing="PyTorch is not installed")
        return
    import torch

    yield Contestant("PyTorch grid_sample", "torch", functools.partial(torch_runs, case, arrays, dtype, original=False))
    if torch.cuda.is_available() and importlib.util.find_spec("mmcv") and importlib.util.find_spec("mmcv._ext"):
        # The operator has no bfloat16.
        kind = "float16" if dtype == "bfloat16" else dtype
        make = functools.partial(torch_runs, case, arrays, kind, original=True)
        yield Contestant(f"mmcv's CUDA operator ({kind})", "torch", make)


# Launch settings of the kernel that --sweep compares.
LAUNCHES = tuple(Launch(warps, elements) for warps, elements in itertools.product((1, 2, 4, 8), (2, 4, 8, 16)))


def kernel_calls(
    case: Case, arrays: dict[str, np.ndarray], dtype: str, interpret: bool = False
) -> Callable[[Launch], dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]]]:
    """A function from a launch setting to the kernel, by direction: what is to be jitted, and its arguments."""
    value = jnp.asarray(arrays["value"], dtype)
    locations, weights = (jnp.asarray(arrays[name], jnp.float32) for name in ("locations", "weights"))
    gradient = jnp.asarray(arrays["gradient"], dtype).reshape(*locations.shape[:3], WIDTH)

    def of(launch: Launch) -> dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]]:
        settings: dict[str, Any] = {"spatial_shapes": case.levels, "launch": launch, "interpret": interpret}
        return {
            "forward": (functools.partial(kernel.forward, **settings), (value, locations, weights)),
            "backward": (functools.partial(kernel.backward, **settings), (value, locations, weights, gradient)),
        }

    return of


def print_sweep(case: Case, arrays: dict[str, np.ndarray], dtype: str, repeats: int) -> None:
    """Prints a table of the kernel's times by launch setting."""
    print(f"{'warps':>6} {'channels a thread':>18} {'rows':>5} {'forward ms':>11} {'backward ms':>12}")
    calls = kernel_calls(case, arrays, dtype)
    for launch in LAUNCHES:
        times = [
            1e3 * time_calls(functools.partial(jax.jit(function), *inputs), jax.block_until_ready, repeats).median
            for function, inputs in calls(launch).values()
        ]
        cells = f"{launch.num_warps:6} {launch.elements:18} {launch.block(WIDTH):5}"
        print(f"{cells} {times[0]:11.3f} {times[1]:12.3f}", flush=True)


def print_case(case: Case, arrays: dict[str, np.ndarray], dtype: str, repeats: int) -> None:
    """Prints a table of all implementations' times."""
    floor = compulsory_bytes(case, jnp.dtype(dtype).itemsize)
    print(f"{case.images} images, {case.rows} queries; compulsory traffic forward", end=" ")
    print(f"{floor['forward'] / 1e6:.0f} MB, backward {floor['backward'] / 1e6:.0f} MB")
    rows: dict[str, dict[str, float]] = {}
    for one in contestants(case, arrays, dtype):
        if one.missing:
            print(f"left out: {one.name}: {one.missing}")
            continue
        rows[one.name] = {
            direction: 1e3 * time_calls(run, one.wait, repeats).median for direction, run in one.make().items()
        }
    print(f"{'':28} {'forward ms':>11} {'GB/s':>7} {'x XLA':>6} {'backward ms':>12} {'GB/s':>7} {'x XLA':>6}")
    for name, times in rows.items():
        cells = []
        for direction, milliseconds in times.items():
            wide = 11 if direction == "forward" else 12
            rate, ratio = floor[direction] / milliseconds / 1e6, milliseconds / rows["XLA"][direction]
            cells.append(f"{milliseconds:{wide}.3f} {rate:7.1f} {ratio:6.2f}")
        print(f"{name:28}", *cells, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--cases", default=",".join(CASES if on_gpu else ("encoder_1", "decoder_900")))
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--sweep", action="store_true", help="time the kernel under other launch settings (GPU)")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {arguments.dtype}")
    for name in arguments.cases.split(","):
        if name not in CASES:
            parser.error(f"there is no case {name!r}; known are {', '.join(CASES)}")
        case = CASES[name]
        arrays = make_arrays(case)
        print(f"\n{name}:", end=" ")
        print_case(case, arrays, arguments.dtype, arguments.repeats)
        if arguments.sweep and on_gpu:
            print_sweep(case, arrays, arguments.dtype, arguments.repeats)


if __name__ == "__main__":
    main()
