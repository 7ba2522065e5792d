"""Times the input pipeline of training, from JPEG files to padded batches, on one core and with worker processes.

    python scripts/benchmarks/input.py [--recipes r50_1x r50_1x_lsj] [--images 64] [--objects 7] [--batches 9]
        [--workers 0 1 2]

It draws photograph-like 640x480 images with objects and their outlines into a temporary folder. Then it loads batches of
each recipe in one thread: weak and strong views of 16 images. Times are CPU times, so that other jobs on the machine
disturb them less; they are medians over batches without the first. The last column of the first table is the ratio to the
official input pipeline, which was measured on a core of the same kind.

With --workers it also times worker processes; 0 stands for the threads of one process that the config asks for. These times
are wall-clock times: medians over rounds, in each of which the calling process takes one batch from each worker as fast as
they come. The rate of a core is the rate divided by the number of workers, or of cores if there are fewer. Handing over is
the CPU time of the calling process for one batch.
"""

import argparse
import collections
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ml_collections import ConfigDict

from hpr_jax.config import load_config
from hpr_jax.data.augmentation import views
from hpr_jax.data.build import make_plan, make_views, room_for_boxes, wants_masks
from hpr_jax.data.loading import batches as batching
from hpr_jax.data.loading.batches import TrainLoader, train_batches
from hpr_jax.data.loading.workers import keep_freed_memory
from hpr_jax.data.shapes import CATEGORIES, outline
from hpr_jax.data.sources.coco import load_coco

HEIGHT, WIDTH = 480, 640
# Images a second of the official input pipelines on one core, by kind of augmentation.
OFFICIAL = {"detr": 29.0, "lsj": 1.1}
# The functions, (module, name), that make up each stage. None of them calls a function of another stage.
STAGES = {
    "decode": [(views, "read_annotated_image")],
    "resize, crop, flip, pad": [(views, "apply_to_image")],
    "strong pixels": [(views, "draw_strong_view"), (views, "strong_image")],
    "boxes and masks": [(views, "masked_objects"), (views, "apply_to_boxes"), (views, "strong_objects")],
    "donors' masks": [(views, "choose_donated")],
    "paste": [(views, "paste")],
    "put into the batch": [(batching, "fill_slot"), (batching, "empty_batch")],
}


def make_images(directory: Path, count: int, objects: int, rng: np.random.Generator) -> None:
    """Writes JPEG files of about COCO's size in bytes, and annotations with a polygon of 32 corners for each object."""
    (directory / "train2017").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        coarse = rng.integers(40, 216, (HEIGHT // 16, WIDTH // 16, 3)).astype(np.uint8)
        image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        image = (image + rng.normal(0, 16, image.shape)).clip(0, 255).astype(np.uint8)
        for _ in range(objects):
            radius = HEIGHT * 10 ** rng.uniform(-1.7, -0.5)
            corners = outline("circle", rng.uniform([0, 0], [WIDTH, HEIGHT]), radius, 0.0)
            cv2.fillPoly(image, [np.rint(corners).astype(np.int32)], rng.integers(0, 256, 3).tolist())
            corners = corners.clip(0, [WIDTH, HEIGHT])
            low, high = corners.min(axis=0), corners.max(axis=0)
            annotation: dict[str, Any] = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotation |= {"bbox": [*low, *(high - low)], "segmentation": [corners.ravel().tolist()]}
            annotations.append(annotation)
        cv2.imwrite(str(directory / f"train2017/{number}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
    categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (directory / "annotations.json").write_text(json.dumps(content))


class Stopwatch:
    """A context that counts the CPU seconds of this thread in each stage, by timed functions in place of those of STAGES."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.originals: list[tuple[Any, str, Callable]] = []

    def __enter__(self) -> "Stopwatch":
        for stage, functions in STAGES.items():
            for module, name in functions:
                self.originals.append((module, name, getattr(module, name)))
                setattr(module, name, self._timed(stage, getattr(module, name)))
        return self

    def __exit__(self, *_) -> None:
        for module, name, original in self.originals:
            setattr(module, name, original)

    def _timed(self, stage, function):
        def timed(*arguments, **keywords):
            began = time.thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[stage] += time.thread_time() - began

        return timed


def make_loader(config: ConfigDict, directory: Path) -> TrainLoader:
    """The loader that training would have."""
    dataset = load_coco(directory, "train2017", "annotations.json", masks=wants_masks(config))
    make = make_views(config, dataset)
    return TrainLoader(make_plan(config, dataset), make, room_for_boxes(config, dataset, make))


def bench(loader: TrainLoader, batches: int) -> tuple[float, dict[str, float]]:
    """Images a second of one core, and milliseconds an image of each stage."""
    rates: list[float] = []
    stages: dict[str, list[float]] = collections.defaultdict(list)
    with Stopwatch() as watch:
        for step in range(batches + 1):
            watch.seconds.clear()
            began = time.thread_time()
            loader[step]
            seconds = time.thread_time() - began
            if step == 0:
                continue
            rates.append(loader.plan.batch_size / seconds)
            watch.seconds["the rest"] = seconds - sum(watch.seconds.values())
            for stage in (*STAGES, "the rest"):
                stages[stage].append(1e3 * watch.seconds[stage] / loader.plan.batch_size)
    return float(np.median(rates)), {stage: float(np.median(t)) for stage, t in stages.items()}


def bench_workers(loader: TrainLoader, threads: int, workers: int, rounds: int) -> tuple[float, float, float]:
    """Seconds to the first batch, images a second, and CPU milliseconds of handing over a batch."""
    together = workers or threads
    began = time.perf_counter()
    batches = train_batches(loader, 0, 2**40, threads, workers)
    next(batches)
    start = time.perf_counter() - began
    # Batches that were loaded ahead would come too fast.
    for _ in range(3 * together):
        next(batches)
    walls, hand_overs = [], []
    for _ in range(rounds):
        began, used = time.perf_counter(), time.thread_time()
        for _ in range(together):
            next(batches)
        walls.append(time.perf_counter() - began)
        hand_overs.append(1e3 * (time.thread_time() - used) / together)
    batches.close()
    return start, together * loader.plan.batch_size / float(np.median(walls)), float(np.median(hand_overs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["r50_1x", "r50_1x_lsj"], help="variants of configs/ddq.py")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--objects", type=int, default=7, help="in each image")
    parser.add_argument("--batches", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="numbers of worker processes to compare")
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        make_images(Path(directory), arguments.images, arguments.objects, np.random.default_rng(0))
        sizes = [path.stat().st_size for path in Path(directory, "train2017").iterdir()]
        print(
            f"{len(sizes)} images, {WIDTH}x{HEIGHT}, {np.median(sizes) / 1e3:.0f} kB each, {arguments.objects} objects each"
        )
        names = {recipe: str(Path(__file__).parents[2] / f"configs/ddq.py:{recipe}") for recipe in arguments.recipes}
        configs = {recipe: load_config(name) for recipe, name in names.items()}
        loaders = {recipe: make_loader(config, Path(directory)) for recipe, config in configs.items()}
        results = {recipe: bench(loader, arguments.batches) for recipe, loader in loaders.items()}
        by_workers = {
            recipe: {w: bench_workers(loader, configs[recipe].data.threads, w, arguments.batches) for w in arguments.workers}
            for recipe, loader in loaders.items()
        }
    print(f"\n{'recipe':26}{'images/s of a core':>20}{'x official':>12}")
    for recipe, (rate, _) in results.items():
        print(f"{recipe:26}{rate:20.1f}{rate / OFFICIAL[configs[recipe].augmentation.kind]:12.1f}")
    print(f"\n{'ms an image':26}" + "".join(f"{recipe:>16}" for recipe in results))
    for stage in (*STAGES, "the rest"):
        print(f"{stage:26}" + "".join(f"{stages[stage]:16.2f}" for _, stages in results.values()))
    for recipe, measured in by_workers.items():
        show_workers(recipe, configs[recipe].data.threads, measured)


def show_workers(recipe: str, threads: int, measured: dict[int, tuple[float, float, float]]) -> None:
    """Prints a table of what `bench_workers` returned for each number of workers."""
    if not measured:
        return
    print(f"\n{recipe:16}{'images/s':>10}{'x one worker':>14}{'a core':>10}{'hand over, ms':>15}{'first batch, s':>16}")
    for workers, (start, rate, hand_over) in measured.items():
        name = f"{workers} workers" if workers else f"{threads} threads"
        ratio = f"{rate / measured[1][1]:.2f}" if 1 in measured else "-"
        core = rate / min(workers or threads, os.cpu_count() or 1)
        print(f"{name:16}{rate:10.1f}{ratio:>14}{core:10.1f}{hand_over:15.1f}{start:16.1f}")


if __name__ == "__main__":
    main()
