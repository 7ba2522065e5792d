"""RoIAlign at the sizes of a detector: the arrays, and the implementations that are compared."""

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sampling import LEVELS, Contestant, Runs

from hpr_jax.ops.roi_align import roi_align


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one use of RoIAlign."""

    images: int
    boxes: int
    levels: tuple[tuple[int, int], ...] = LEVELS
    strides: tuple[int, ...] = (8, 16, 32, 64)
    channels: int = 256
    bins: int = 7
    ratio: int = 2
    finest_scale: float = 56.0

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `roi_align`."""
        return {
            "strides": self.strides,
            "output_size": self.bins,
            "sampling_ratio": self.ratio,
            "finest_scale": self.finest_scale,
        }

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.levels)


CASES = {"decoder_300": Case(1, 300), "decoder_950": Case(4, 950)}
SMALL = Case(2, 5, ((12, 10), (6, 5)), (8, 16), channels=16, bins=3, finest_scale=30.0)


def make_arrays(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Random features, and boxes of all sizes: some reach out of the image, and the first image is the smaller one."""
    rng = np.random.default_rng(seed)
    (height, width), stride = case.levels[0], case.strides[0]
    sides = np.exp(rng.uniform(np.log(4), np.log(stride * max(height, width)), (case.images, case.boxes, 2)))
    center = rng.uniform(0, 1, (case.images, case.boxes, 2)) * (stride * width, stride * height)
    valid = np.tile(np.array(case.levels, np.int32), (case.images, 1, 1))
    valid[0] = np.maximum(valid[0] * 3 // 4, 1)
    return {
        "features": rng.standard_normal((case.images, case.tokens, case.channels), np.float32),
        "valid": valid,
        "boxes": np.concatenate([center - sides / 2, center + sides / 2], axis=-1).astype(np.float32),
        "gradient": rng.standard_normal((case.images, case.boxes, case.bins**2, case.channels), np.float32),
    }


def jax_runs(case: Case, arrays: dict[str, np.ndarray], dtype: str, implementation: str) -> Runs:
    features, gradient = (jnp.asarray(arrays[name], dtype) for name in ("features", "gradient"))
    valid, boxes = (jnp.asarray(arrays[name]) for name in ("valid", "boxes"))

    def align(features):
        return roi_align(features, case.levels, valid, boxes, implementation=implementation, **case.settings)

    forward = jax.jit(align)
    backward = jax.jit(lambda gradient, features: jax.vjp(align, features)[1](gradient))
    return {"forward": lambda: forward(features), "backward": lambda: backward(gradient, features)}


def torch_runs(case: Case, arrays: dict[str, np.ndarray], dtype: str) -> Runs:
    """torchvision's operator, called for each level with the boxes that belong there.

    It knows no valid sizes, and takes maps with channels first.
    """
    import torch
    from torchvision.ops import roi_align as operator

    device, kind = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype)
    table = torch.tensor(arrays["features"], dtype=kind, device=device)
    maps, start = [], 0
    for height, width in case.levels:
        level = table[:, start : start + height * width].transpose(1, 2).reshape(case.images, -1, height, width)
        maps.append(level.contiguous().requires_grad_())
        start += height * width
    boxes = arrays["boxes"]
    scale = np.sqrt((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))
    levels = np.clip(np.floor(np.log2(scale / case.finest_scale + 1e-6)), 0, len(maps) - 1)
    images = np.broadcast_to(np.arange(case.images)[:, None], levels.shape)
    rows = np.concatenate([images[..., None], boxes], axis=-1)
    by_level = [torch.tensor(rows[levels == level], dtype=kind, device=device) for level in range(len(maps))]

    def align() -> list[Any]:
        return [
            operator(features, rows, case.bins, 1 / stride, case.ratio, aligned=True)
            for features, rows, stride in zip(maps, by_level, case.strides)
        ]

    out = align()
    gradients = [torch.randn_like(x) for x in out]

    def forward() -> list[Any]:
        with torch.no_grad():
            return align()

    return {"forward": forward, "backward": lambda: torch.autograd.grad(out, maps, gradients, retain_graph=True)}


def contestants(case: Case, arrays: dict[str, np.ndarray], dtype: str, *, interpret: bool) -> Iterator[Contestant]:
    """The implementations, as `contestants` of scripts/benchmarks/sampling.py gives them."""
    implementation = "pallas_interpret" if interpret else "pallas"
    yield Contestant("Pallas kernel", make=functools.partial(jax_runs, case, arrays, dtype, implementation))
    if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
        # The operator has no bfloat16.
        kind = "float16" if dtype == "bfloat16" else dtype
        yield Contestant(f"torchvision's operator ({kind})", "torch", functools.partial(torch_runs, case, arrays, kind))
    else:
        yield Contestant("torchvision's operator", "torch", missing="torchvision is not installed")
    yield Contestant("XLA", make=functools.partial(jax_runs, case, arrays, dtype, "xla"))
