"""A tiny detector and tiny data for tests, with the same shapes everywhere, so that tests share compiled programs."""

import functools
import json
import os
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hpr_jax.config import load_config
from hpr_jax.models.build import random_detector
from hpr_jax.types import Targets

ROOT = Path(__file__).parent.parent.parent
CLASSES = 3
SIDE = 64
# Weak augmentation for small images.
WEAK = {"flip": 0.5, "sides": (48, 64), "max_side": 96, "crop": 0.5, "crop_sides": (60, 80), "crop_range": (40, 70)}


def config(directory: Path | None = None, model: str = "ddq"):
    """Config of the variant `demo` of a detector, made smaller still."""
    c = load_config(f"{ROOT}/configs/{model}.py:demo")
    shrink(c)
    # Rematerialisation takes a third of the time of tracing; test_compute.py, test_training.py and the stored run have it.
    c.compute.remat = ()
    # A CPU takes these operations by default, too, but traces the kernels first.
    c.compute.operations = "xla"
    c.augmentation.update(sides=(SIDE,), max_side=SIDE)
    c.data.update(directory=str(directory), max_boxes=4, threads=1)
    c.train.update(batch_size=2, steps=4, log_every=2, checkpoint_every=2, evaluate_every=4)
    # Pictures take seconds; tests/training/test_pictures.py has them.
    c.train.plots = False
    c.evaluate.update(batch_size=2, side=SIDE, max_side=SIDE, detections=10)
    return c


def small(directory: Path | None = None):
    """The config with the least to compile, where it does not matter what is trained: one refiner, and a frozen backbone."""
    c = config(directory, "deformable_detr")
    c.model.refiner.auxiliaries = ()
    c.model.backbone.update(norm="frozen_batch", frozen_stages=4)
    c.train.initial_weights = "random"
    return c


def shrink(c):
    """Makes the model of a config tiny."""
    c.model.update(channels=16, heads=2, hidden=24, points=2)
    c.model.backbone.base_channels = 8
    c.model.neck.groups = 4
    c.model.queries.count = 8
    if "dense_ratio" in c.model.queries:
        c.model.queries.dense_ratio = 1.5
    c.model.denoising.queries = min(c.model.denoising.queries, 4)
    c.model.refiner.region.output_size = 3
    c.model.refiner.dynamic_conv.hidden = 4
    c.model.refiner.regional_attention.update(heads=2, samples=2)
    c.model.refiner.global_attention.heads = 2
    c.model.refiner.region_fc.hidden = 8


def split_parameters(module: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The structure of a module, its parameters, and its other variables."""
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states
    return graph, params, rest


def fill(detector: nnx.Module) -> None:
    """Fills a detector that has shapes alone with weights about as large as initial ones, but drawn by NumPy, so that
    nothing is compiled."""
    rng = np.random.default_rng(0)
    filled = []
    for path, variable in nnx.to_flat_state(nnx.state(detector)):
        shape = variable.shape
        # Kernels of convolutions are [h, w, in, out], others [..., in, out].
        inputs = shape[:-1] if len(shape) == 4 else shape[-2:-1]
        fan_in = np.prod(inputs) if path[-1] in ("kernel", "embedding") else 100
        value = rng.normal(size=shape) * fan_in**-0.5 + (path[-1] in ("scale", "weights"))
        value = np.abs(value) + 1 if path[-1] == "variance" else value
        # Rounded by NumPy: JAX would compile a program for each shape.
        filled.append((path, variable.replace(jnp.asarray(value.astype(np.float32)))))
    nnx.update(detector, nnx.from_flat_state(filled))


@functools.cache
def detector():
    """A detector with random weights, also where they start as zeros, so that boxes and offsets depend on the image."""
    graph, params, rest = split_parameters(random_detector(config().model, CLASSES))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noisy = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return nnx.merge(graph, jax.tree.unflatten(structure, noisy), rest)


def targets(counts, most, sizes, seed=0):
    """Random ground truth: `counts` boxes of each image, padded to `most`; `sizes` are (height, width) of the images."""
    rng = np.random.default_rng(seed)
    batch = len(counts)
    center, side = rng.uniform(0.3, 0.7, (batch, most, 2)), rng.uniform(0.1, 0.5, (batch, most, 2))
    return Targets(
        boxes=jnp.asarray(np.concatenate([center, side], axis=-1), jnp.float32),
        labels=jnp.asarray(rng.integers(0, CLASSES, (batch, most)), jnp.int32),
        valid=jnp.arange(most) < jnp.asarray(counts)[:, None],
        sizes=jnp.asarray(sizes, jnp.int32),
    )


CONFIG_FILE = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import tiny


def get_config():
    config = {made}
    {settings}
    return config
"""


def write_config(path: Path, directory: Path, *settings: str, function: str = "config") -> Path:
    """A config file of `config(directory)`, or of another function, for the command line; settings are like
    `train.steps = 3`."""
    lines = "\n    ".join(f"config.{setting}" for setting in settings)
    made = f"tiny.{function}(Path({str(directory)!r}))"
    path.write_text(CONFIG_FILE.format(tests=str(ROOT / "tests/helpers"), made=made, settings=lines))
    return path


def process_environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports this project and the tests' helpers, and shares their compilation cache."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(jax.config.values["jax_persistent_cache_min_compile_time_secs"]),
    }
    return {**os.environ, "PYTHONPATH": path, **cache, **more}


def write_turned(path: Path, pixels: np.ndarray, orientation: int) -> None:
    """Writes a JPEG with an EXIF orientation."""
    data = cv2.imencode(".jpg", pixels)[1].tobytes()
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation, 0, 0, 0]) + b"\0\0\0\0"
    segment = b"Exif\0\0" + tiff
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:])


def write_coco(directory: Path, train: int = 6, val: int = 3) -> Path:
    """Writes a data set with gaps in the category ids, a crowd box, an image without objects and an impossible box. Masks
    fill the boxes of their objects."""
    rng = np.random.default_rng(0)
    for split, count in (("train2017", train), ("val2017", val)):
        (directory / split).mkdir(parents=True)
        images: list[dict] = []
        annotations: list[dict] = []

        def annotate(image, bbox, category, crowd=0, annotations=annotations):
            x, y, w, h = bbox
            polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": crowd,
                    "segmentation": {"size": [48, 60], "counts": [0, 48 * 60]} if crowd else polygons,
                }
            )

        for number in range(count):
            image_id, name = 10 * number + 7, f"{number}.jpg"
            picture = rng.integers(0, 80, (48, 60, 3)).astype(np.uint8)
            images.append({"id": image_id, "file_name": name, "height": 48, "width": 60})
            if number != 1:
                for category in (2, 5):
                    x, y = rng.integers(0, 30, 2).tolist()
                    picture[y : y + 15, x : x + 20, category % 3] = 250
                    annotate(image_id, [x, y, 20, 15], category)
            cv2.imwrite(str(directory / split / name), picture)
        annotate(7, [0, 0, 60, 48], 9, crowd=1)
        annotate(7, [10, 10, 0, 5], 9)
        categories = [{"id": 2, "name": "cup"}, {"id": 5, "name": "pen"}, {"id": 9, "name": "hat"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (directory / "annotations").mkdir(exist_ok=True)
        (directory / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return directory
