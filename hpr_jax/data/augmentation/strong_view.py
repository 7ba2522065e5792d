"""Data re-augmentation (paper section 3.2): the strong view of a weakly augmented image.

One colour and one geometric operation in random order, then erased patches; the size stays. Operations, ranges and the
treatment of boxes are those of the official configs: all operations of a list are equally likely, strengths are uniform and
rounded to one decimal, both signs of a geometric one are equally likely. A translation, as a part of the side, is rounded to
nothing or a tenth.
"""

import dataclasses
import functools

import cv2
import numpy as np

from hpr_jax.data.augmentation.colour import OPERATIONS
from hpr_jax.data.augmentation.geometry import has_area, move_boxes
from hpr_jax.data.augmentation.objects import Objects
from hpr_jax.data.masks import Patch

# What geometric operations bare, and what patches are filled with.
FILL = 128
# Largest magnitude of each geometric operation: degrees, or a fraction of the side.
GEOMETRIC = {"rotate": 30.0, "shear_x": 30.0, "shear_y": 30.0, "translate_x": 0.1, "translate_y": 0.1}
# From one to five patches with sides up to a fifth of the image's.
PATCHES = (1, 5)
PATCH_SIDE = 0.2
# Objects with this part of their box under patches are dropped; what two patches cover counts twice.
ERASED = 0.9


@dataclasses.dataclass(frozen=True)
class StrongView:
    """What makes a strong view out of a weak one.

    Attributes:
      size: (height, width) of the image.
      colour, strength: a colour operation.
      geometric, magnitude: a geometric operation, with its sign.
      colour_first: which of them comes first.
      patches: erased rectangles.
    """

    size: tuple[int, int]
    colour: str
    strength: float
    geometric: str
    magnitude: float
    colour_first: bool
    patches: tuple[Patch, ...]

    @functools.cached_property
    def matrix(self) -> np.ndarray:
        """Where the geometric operation moves (x, y), centres of pixels having whole numbers: float64 `[2, 3]`."""
        height, width = self.size
        if self.geometric == "rotate":
            return cv2.getRotationMatrix2D(((width - 1) * 0.5, (height - 1) * 0.5), -self.magnitude, 1.0)
        matrix = np.eye(2, 3)
        if self.geometric == "shear_x":
            matrix[0, 1] = np.tan(np.radians(self.magnitude))
        elif self.geometric == "shear_y":
            matrix[1, 0] = np.tan(np.radians(self.magnitude))
        elif self.geometric == "translate_x":
            matrix[0, 2] = int(width * self.magnitude)
        else:
            matrix[1, 2] = int(height * self.magnitude)
        return matrix


def draw_strong_view(size: tuple[int, int], rng: np.random.Generator) -> StrongView:
    """Draws a strong view for an image of (height, width) `size`."""
    colour, geometric = str(rng.choice(list(OPERATIONS))), str(rng.choice(list(GEOMETRIC)))
    low, high = OPERATIONS[colour][1]
    strength, magnitude = round(rng.uniform(low, high), 1), round(rng.uniform(0, GEOMETRIC[geometric]), 1)
    sign, colour_first = rng.choice([-1, 1]), bool(rng.integers(2))
    patches = []
    for _ in range(rng.integers(PATCHES[0], PATCHES[1], endpoint=True)):
        part = rng.uniform(0, PATCH_SIDE)
        height, width = int(size[0] * part), int(size[1] * part)
        top, left = int(rng.integers(size[0] - height)), int(rng.integers(size[1] - width))
        patches.append((left, top, left + width, top + height))
    return StrongView(size, colour, strength, geometric, float(sign * magnitude), colour_first, tuple(patches))


def strong_image(image: np.ndarray, view: StrongView) -> np.ndarray:
    """The strong view, in new memory, of a weak one: uint8 `[h, w, 3]`."""
    colour = functools.partial(OPERATIONS[view.colour][0], strength=view.strength)
    image = _move_image(colour(image), view) if view.colour_first else colour(_move_image(image, view))
    for left, top, right, bottom in view.patches:
        image[top:bottom, left:right] = FILL
    return image


def strong_objects(objects: Objects, view: StrongView, *, drop_vanished: bool) -> Objects:
    """The objects of the strong view of an image with these objects.

    Boxes become the boxes around their moved corners, clipped. An object that is moved out of sight has a box without area
    then, at the border of the image: it is kept as in the official pipeline, or dropped.
    """
    boxes = move_boxes(objects.boxes, view.matrix, view.size)
    keep = _erased_part(boxes, np.array(view.patches).reshape(-1, 4)) < ERASED
    if drop_vanished:
        keep &= has_area(boxes)
    kept = dataclasses.replace(objects, boxes=boxes).take(keep)
    if kept.regions is None:
        return kept
    regions = tuple(region.warp(view.matrix, view.size).without(view.patches) for region in kept.regions)
    return dataclasses.replace(kept, regions=regions)


def _move_image(image: np.ndarray, view: StrongView) -> np.ndarray:
    height, width = view.size
    if view.geometric.startswith("translate"):
        right, down = view.matrix[:, 2].astype(int)
        moved = np.full_like(image, FILL)
        target = moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
        target[...] = image[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
        return moved
    # OpenCV warps four channels in half the time that it takes for three.
    four = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    return cv2.cvtColor(cv2.warpAffine(four, view.matrix, (width, height), borderValue=(FILL,) * 4), cv2.COLOR_RGBA2RGB)


def _erased_part(boxes: np.ndarray, patches: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[:, None, :2], patches[:, :2])
    high = np.minimum(boxes[:, None, 2:], patches[:, 2:])
    covered = np.maximum(high - low, 0).prod(axis=-1).sum(axis=-1)
    return covered / ((boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) + 1e-7)
