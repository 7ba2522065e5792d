"""Data re-augmentation (paper section 3.2): the strong view of a weakly augmented image.

A colour and a geometric operation are applied in random order, then patches are erased. The size of the image stays.
Operations, ranges and the treatment of boxes are those of the official configs: all operations of a kind are equally likely,
magnitudes are uniform and rounded to one decimal, and both signs of a geometric magnitude are equally likely. Translations
are fractions of the side; rounded to one decimal, they are 0 or 0.1.
"""

import dataclasses
import functools

import cv2
import numpy as np

from hpr_jax.data.augmentation.colour import OPERATIONS
from hpr_jax.data.augmentation.crop_resize_flip import has_area, move_boxes
from hpr_jax.data.augmentation.drawn_masks import Patch
from hpr_jax.data.augmentation.objects import Objects

# The level of erased patches, and of pixels that a geometric operation leaves without a source.
FILL = 128
# The largest magnitude of each geometric operation: degrees of rotations and shears, a fraction of the side of translations.
GEOMETRIC = {"rotate": 30.0, "shear_x": 30.0, "shear_y": 30.0, "translate_x": 0.1, "translate_y": 0.1}
# The smallest and the largest number of patches.
PATCHES = (1, 5)
# The largest side of a patch, as a fraction of the image's.
PATCH_SIDE = 0.2
# The fraction of a box that patches must cover for its object to be dropped. What two patches cover counts twice.
ERASED = 0.9


@dataclasses.dataclass(frozen=True)
class StrongView:
    """What makes a strong view out of a weak one.

    Attributes:
      size: (height, width) of the image.
      colour, strength: the colour operation and its strength.
      geometric, magnitude: the geometric operation and its magnitude, with a sign.
      colour_first: whether the colour operation comes before the geometric one.
      patches: the rectangles that are erased.
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
        """Maps (x, y) as the geometric operation does; centres of pixels have integer coordinates. float64 `[2, 3]`."""
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
    """The strong view of a weak one, both uint8 `[h, w, 3]`; it is in new memory."""
    colour = OPERATIONS[view.colour][0]
    if view.colour_first:
        image = _move_image(colour(image, view.strength), view)
    else:
        image = colour(_move_image(image, view), view.strength)
    for left, top, right, bottom in view.patches:
        image[top:bottom, left:right] = FILL
    return image


def strong_objects(objects: Objects, view: StrongView, *, drop_vanished: bool) -> Objects:
    """The objects of the strong view of an image that has `objects`.

    Boxes become the boxes around their moved corners, clipped to the image.

    Args:
      drop_vanished: whether to drop objects that are moved out of sight. Otherwise they stay, as in the official pipeline,
        with a box without area at the border of the image.
    """
    boxes = move_boxes(objects.boxes, view.matrix, view.size)
    stays = _erased_fraction(boxes, np.array(view.patches).reshape(-1, 4)) < ERASED
    if drop_vanished:
        stays &= has_area(boxes)
    remaining = dataclasses.replace(objects, boxes=boxes).take(stays)
    masks = tuple(mask.warp(view.matrix, view.size).without(view.patches) for mask in remaining.masks)
    return dataclasses.replace(remaining, masks=masks)


def _move_image(image: np.ndarray, view: StrongView) -> np.ndarray:
    height, width = view.size
    if view.geometric.startswith("translate"):
        right, down = view.matrix[:, 2].astype(int)
        moved = np.full_like(image, FILL)
        target = moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
        target[...] = image[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
        return moved
    # OpenCV warps four channels in half the time that three take.
    four = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    return cv2.cvtColor(cv2.warpAffine(four, view.matrix, (width, height), borderValue=(FILL,) * 4), cv2.COLOR_RGBA2RGB)


def _erased_fraction(boxes: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """The fraction of each box, xyxy `[n, 4]`, that patches `[k, 4]` cover, overlaps counted twice: `[n]`."""
    low = np.maximum(boxes[:, None, :2], patches[:, :2])
    high = np.minimum(boxes[:, None, 2:], patches[:, 2:])
    covered = np.maximum(high - low, 0).prod(axis=-1).sum(axis=-1)
    return covered / ((boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) + 1e-7)
