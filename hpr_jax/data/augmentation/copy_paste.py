"""Copy-paste (Ghiasi et al. 2021): objects of a donor image are pasted onto a view and hide what lies below them.

Numbers, thresholds and the treatment of crowds are those of the official pipeline.
"""

import dataclasses

import cv2
import numpy as np

from hpr_jax.data.augmentation.crop_resize_flip import Geometry, apply_to_boxes, has_area
from hpr_jax.data.augmentation.drawn_masks import DrawnMask, draw_box, draw_mask
from hpr_jax.data.augmentation.objects import Objects, join
from hpr_jax.data.dataset import ImageAnnotations

# The number of pasted objects and crowds is below this.
MAX_PASTED = 100
# An object that is partly hidden stays if no side of the box around its visible part is further than HIDDEN_BOX pixels from
# the side of its box before, or if more than HIDDEN_AREA pixels of it are visible.
HIDDEN_BOX = 10
HIDDEN_AREA = 300


def masked_objects(annotations: ImageAnnotations, geometry: Geometry) -> Objects:
    """The objects of an image after a geometry, with masks, which must have been read.

    The boxes are those around what the geometry leaves of the masks. An object without a mask counts as filling its box.
    """
    boxes, remains = apply_to_boxes(annotations.boxes, geometry)
    drawn = []
    for index, mask in enumerate(annotations.masks):
        if mask is None:
            drawn.append(draw_box(boxes[index], geometry.resized))
        else:
            drawn.append(draw_mask(mask, geometry.matrix, geometry.resized))
            boxes[index] = drawn[-1].box
    return Objects(boxes, annotations.labels, tuple(drawn)).take(remains & has_area(boxes))


def choose_donated(donor: ImageAnnotations, geometry: Geometry, rng: np.random.Generator) -> tuple[Objects, list[DrawnMask]]:
    """Draws what is pasted of a donor image: objects, and crowds, which hide what lies below but are no objects.

    If the geometry leaves n objects and crowds of the donor, the number that is pasted is uniform from 0 to n, but below
    `MAX_PASTED`. Objects without a mask are never pasted.
    """
    has_mask = np.array([mask is not None for mask in donor.masks], bool)
    masks = tuple(mask for mask in donor.masks if mask is not None)
    donor = dataclasses.replace(donor, boxes=donor.boxes[has_mask], labels=donor.labels[has_mask], masks=masks)
    objects = masked_objects(donor, geometry)
    drawn = [draw_mask(mask, geometry.matrix, geometry.resized) for mask in donor.crowds]
    crowds = [crowd for crowd in drawn if crowd.area]
    count = len(objects) + len(crowds)
    chosen = rng.choice(count, rng.integers(min(count + 1, MAX_PASTED)), replace=False)
    donated = objects.take(chosen[chosen < len(objects)])
    return donated, [crowds[index - len(objects)] for index in chosen if index >= len(objects)]


def paste(
    image: np.ndarray, objects: Objects, donor: np.ndarray, donated: Objects, crowds: list[DrawnMask]
) -> tuple[np.ndarray, Objects]:
    """Pastes objects and crowds of a donor image onto an image of the same size.

    Args:
      image: uint8 `[h, w, 3]`; it is written to.
      objects: its objects, with masks.
      donor: the donor image, uint8 `[h, w, 3]`.
      donated: the objects of the donor image that are pasted, with masks.
      crowds: the crowds of the donor image that are pasted.

    Returns:
      The image, and its objects with the donated ones behind them. Objects that were there before have the boxes of their
      visible parts; those that are hidden are dropped.
    """
    cover = np.zeros(image.shape[:2], np.uint8)
    for pasted in (*donated.masks, *crowds):
        cover[pasted.window] |= pasted.bitmap
    masks = tuple(mask.behind(cover) for mask in objects.masks)
    boxes = np.array([mask.box for mask in masks], np.float32).reshape(-1, 4)
    areas = np.array([mask.area for mask in masks], np.int64)
    stays = np.all(np.abs(boxes - objects.boxes) <= HIDDEN_BOX, axis=1) | (areas > HIDDEN_AREA)
    visible = Objects(boxes, objects.labels, masks).take(stays & (areas > 0))
    return cv2.copyTo(donor, cover, image), join(visible, donated)
