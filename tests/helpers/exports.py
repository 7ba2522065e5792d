"""Tiny detectors to export, and what runs exported ones without this project."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny

from hpr_jax.data.dataset import Classes
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.models.build import abstract_detector, random_detector
from hpr_jax.weights.source import Source

CLASSES = Classes(("cup", "pen", "hat"), (2, 5, 9))
LANDSCAPE = np.random.default_rng(0).integers(0, 256, (48, 60, 3)).astype(np.uint8)
PORTRAIT = np.ascontiguousarray(LANDSCAPE.swapaxes(0, 1))


def source(model="deformable_detr", *, plain=True, side=64, max_side=64, canvas=0):
    """A tiny detector with random weights; a plain one has one refiner."""
    config = tiny.config(model=model)
    config.evaluate.update(side=side, max_side=max_side, canvas=canvas)
    if plain:
        config.model.refiner.auxiliaries = ()

    def build(compute):
        return random_detector(config.model, tiny.CLASSES, compute=compute)

    return Source(Path("tiny"), CLASSES, config, 0, {}, build)


def filled(model, *, plain=True, change=None, **settings):
    """The same with weights that NumPy draws, so that boxes and scores depend on the image.

    Args:
      change: what else is done to its config.
    """
    made = source(model, plain=plain, **settings)
    if change:
        change(made.config)

    def build(compute):
        module = abstract_detector(made.config.model, tiny.CLASSES, compute)
        tiny.fill(module)
        return module

    return dataclasses.replace(made, build=build)


def detector(made):
    return ImageDetector(made.load(), made.classes, made.config)


def alike(found, expected):
    """Detections of another runtime, which rounds otherwise: boxes in pixels, to 1e-4 of the image's sides of about 50."""
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=5e-3)
    assert (found.names, found.category_ids) == (expected.names, expected.category_ids)
    assert len(found)


def same(found, expected):
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.names, found.category_ids) == (expected.names, expected.category_ids)
    assert len(found)


# A process that has no other packages of its own than these, and finds no others.
ALONE = """
import importlib.abc, sys

class Barrier(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hpr_jax", "flax", "cv2", "ml_collections", "safetensors", "optax", "orbax"):
            raise ImportError(name)

sys.meta_path.insert(0, Barrier())
import numpy as np
image, original_size = np.load("image.npy"), (48, 60)
"""


def follow_readme(folder, place, image):
    """What the lines of a folder's README find in an image, in a process that has JAX and NumPy alone."""
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    lines = lines.replace('Path(".")', f"Path({str(folder)!r})")
    np.save(place / "image.npy", image)
    (place / "lines.py").write_text(f"{ALONE}{lines}\nnp.savez('found.npz', **found)\n")
    environment = {**tiny.process_environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    subprocess.run([sys.executable, "lines.py"], cwd=place, env=environment, check=True, capture_output=True)
    return np.load(place / "found.npz")
