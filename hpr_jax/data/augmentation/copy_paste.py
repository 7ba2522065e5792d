"""Copy-paste (Ghiasi et al. 2021): objects of a donor image are pasted onto a view, and hide what lies below.

Numbers, thresholds and the treatment of crowds are those of the official pipeline.
"""

import dataclasses

import cv2
import numpy as np

from hpr_jax.data.augmentation.geometry import Geometry, apply_to_boxes, has_area
from hpr_jax.data.augmentation.objects import Objects, join
from hpr_jax.data.augmentation.regions import Region, box_region, draw_mask
from hpr_jax.data.dataset import Record

# Fewer objects than this are pasted.
MAX_PASTED = 100
# An object stays if no side of its visible part's box is further than so many pixels from its box, or if more pixels than so
# many are visible.
HIDDEN_BOX = 10
HIDDEN_AREA = 300


def masked_objects(record: Record, geometry: Geometry) -> Objects:
    """The objects of a record after a geometry, with masks; their boxes are those of what the geometry leaves of the masks.
    Objects without a mask count as filling their box."""
    boxes, remains = apply_to_boxes(record.boxes, geometry)
    regions = []
    for index, mask in enumerate(record.masks):
        if mask is None:
            regions.append(box_region(boxes[index], geometry.resized))
        else:
            regions.append(draw_mask(mask, geometry.matrix, geometry.resized))
            boxes[index] = regions[-1].box
    return Objects(boxes, record.labels, tuple(regions)).take(remains & has_area(boxes))


def choose_donated(record: Record, geometry: Geometry, rng: np.random.Generator) -> tuple[Objects, list[Region]]:
    """Draws what is pasted of a donor: objects, and regions of crowds, which hide what lies below but are no objects.

    Of the n objects and crowds that the donor's geometry leaves, a number from 0 to n, below `MAX_PASTED`, all as likely.
    Objects without a mask are never pasted.
    """
    has_mask = np.array([mask is not None for mask in record.masks], bool)
    masks = tuple(mask for mask in record.masks if mask is not None)
    record = dataclasses.replace(record, boxes=record.boxes[has_mask], labels=record.labels[has_mask], masks=masks)
    objects = masked_objects(record, geometry)
    crowds = [draw_mask(mask, geometry.matrix, geometry.resized) for mask in record.crowds]
    crowds = [region for region in crowds if region.area]
    count = len(objects) + len(crowds)
    chosen = rng.choice(count, rng.integers(min(count + 1, MAX_PASTED)), replace=False)
    donated = objects.take(chosen[chosen < len(objects)])
    return donated, [crowds[index - len(objects)] for index in chosen if index >= len(objects)]


def paste(
    image: np.ndarray, objects: Objects, donor: np.ndarray, donated: Objects, crowds: list[Region]
) -> tuple[np.ndarray, Objects]:
    """Pastes the donated objects and crowds of a donor image onto an image of the same size.

    Returns:
      The image, which is written to, and its objects: boxes of those that were there are those of their visible parts now.
    """
    cover = np.zeros(image.shape[:2], np.uint8)
    for region in (*donated.regions, *crowds):
        cover[region.window] |= region.bitmap
    regions = tuple(region.behind(cover) for region in objects.regions)
    boxes = np.array([region.box for region in regions], np.float32).reshape(-1, 4)
    areas = np.array([region.area for region in regions], np.int64)
    stays = np.all(np.abs(boxes - objects.boxes) <= HIDDEN_BOX, axis=1) | (areas > HIDDEN_AREA)
    visible = Objects(boxes, objects.labels, regions).take(stays & (areas > 0))
    return cv2.copyTo(donor, cover, image), join(visible, donated)
