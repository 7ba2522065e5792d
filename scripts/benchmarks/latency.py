"""Times detection by JAX and by ONNX Runtime on a CPU, and counts how many detections are equal.

Weights are random, and the image is noise. Calls alternate, so that other jobs on the machine slow both down. Seconds are
medians of the clock, beside seconds of all cores together. A detection is equal if the other one has it with the same label,
a score within 1e-4, and a box within 1e-4 of the image's longer side.

examples:
  python scripts/benchmarks/latency.py --cores 2
  python scripts/benchmarks/latency.py --config configs/ddq.py:demo --size 128x128 --batches 1,8 --official 0.11,0.62
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("size", "batch", "JAX s", "cores' s", "ONNX s", "cores' s", "ratio", "MB", "load s", "equal", "official", "ratio")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parents[2] / "configs/ddq.py:r50_1x"))
    parser.add_argument("--size", default="800x1344", metavar="HxW", help="of the padded images")
    parser.add_argument("--batches", default="1", metavar="N,...", help="numbers of images of a call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--cores", type=int, help="run on so many cores alone")
    parser.add_argument("--official", metavar="S,...", help="seconds of the official implementation, for each batch")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    batches = [int(number) for number in arguments.batches.split(",")]
    official = (
        [float(number) for number in arguments.official.split(",")] if arguments.official else [float("nan")] * len(batches)
    )
    print(" ".join(f"{name:>9}" for name in COLUMNS))
    for batch, seconds in zip(batches, official, strict=True):
        print(" ".join(f"{cell:>9}" for cell in row(arguments, batch, seconds)), flush=True)


def row(arguments: argparse.Namespace, batch: int, official: float) -> list[str]:
    """The cells of the table for one number of images."""
    height, width = (int(side) for side in arguments.size.split("x"))
    images = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3)).astype(np.uint8)
    sizes = np.tile(np.array([[height, width]], np.int32), (batch, 1))
    with tempfile.TemporaryDirectory() as place:
        by_jax, by_onnx, megabytes, loading = runners(arguments, batch, (height, width), Path(place) / "x")
        equal = [equals(*pair, max(height, width)) for pair in zip(by_jax(images, sizes), by_onnx(images, sizes))]
        times: list[list[tuple[float, float]]] = [[], []]
        for _ in range(arguments.repeats):
            for run, found in zip((by_jax, by_onnx), times):
                start = time.perf_counter(), time.process_time()
                run(images, sizes)
                found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    jax_s, onnx_s = (np.median(found, axis=0) for found in times)
    share = f"{sum(count for count, _ in equal)}/{sum(of for _, of in equal)}"
    seconds = [f"{number:.3f}" for number in (*jax_s, *onnx_s)]
    ratios = [f"{onnx_s[0] / jax_s[0]:.2f}", f"{megabytes:.1f}", f"{loading:.1f}", share]
    return [arguments.size, str(batch), *seconds, *ratios, f"{official:.3f}", f"{jax_s[0] / official:.2f}"]


def runners(
    arguments: argparse.Namespace, batch: int, size: tuple[int, int], folder: Path
) -> tuple[Callable[..., Any], Callable[..., Any], float, float]:
    """What detects by JAX, and by ONNX Runtime: arrays of boxes, scores and labels of each image; the file's size in MB, and
    the seconds that loading takes."""
    import jax
    from flax import nnx
    from model import quick_detector

    from hpr_jax.config import load_config
    from hpr_jax.data.dataset import Classes
    from hpr_jax.inference.detect import make_detect
    from hpr_jax.inference.export import Wanted, write_exported
    from hpr_jax.inference.onnx.session import OnnxSession
    from hpr_jax.weights.source import Source

    config = load_config(arguments.config)
    config.compute.update(dtype="float32", operations="xla", remat=())
    classes = Classes(tuple(map(str, range(arguments.classes))), tuple(range(arguments.classes)))

    def build(compute):
        return quick_detector(config.model, arguments.classes, compute=compute)

    write_exported(folder, Source(folder, classes, config, 0, {}, build), Wanted(("onnx",), batch, (size,)))
    (file,) = folder.glob("*.onnx")
    start = time.perf_counter()
    session = OnnxSession(file)
    loading = time.perf_counter() - start
    graph, state = nnx.split(build(config.compute))
    detect = make_detect(graph, config.evaluate.detections)

    def by_jax(images: np.ndarray, sizes: np.ndarray) -> list[Any]:
        boxes, scores, labels, _ = jax.device_get(detect(state, images, sizes))
        return list(zip(boxes, scores, labels))

    def by_onnx(images: np.ndarray, sizes: np.ndarray) -> list[Any]:
        found = session(images, sizes, sizes)
        return list(zip(found["boxes"], found["scores"], found["labels"]))

    return by_jax, by_onnx, file.stat().st_size / 1e6, loading


def equals(first: Any, second: Any, side: int) -> tuple[int, int]:
    """How many detections of one image the other runtime has, too, and of how many."""
    boxes, scores, labels = (np.asarray(one)[:, None] - np.asarray(other)[None] for one, other in zip(first, second))
    near = (np.abs(boxes).max(-1) <= 1e-4 * side) & (np.abs(scores) <= 1e-4) & (labels == 0)
    return int(near.any(axis=1).sum()), len(near)


if __name__ == "__main__":
    main()
