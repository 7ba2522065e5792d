"""Pictures of many images: of a batch as the network sees it, and of detections beside the ground truth.

Images are RGB uint8 `[h, w, 3]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpr_jax.data.dataset import Classes, Record
from hpr_jax.data.loading.batches import Batch
from hpr_jax.inference.drawing import contact_sheet, draw, scaled, titled

# Height of the images, in pixels, and how many are in a row: what belongs together comes in twos.
HEIGHT, PER_ROW = 320, 4

# In COCO's results format: `image_id`, `category_id`, `bbox` (left, top, width, height in pixels), `score`.
Detection = Mapping[str, Any]


def draw_pair(
    image: np.ndarray, record: Record, found: Sequence[Detection], classes: Classes, threshold: float
) -> list[np.ndarray]:
    """An image with its detections, and with its ground truth.

    Args:
      image: uint8 `[h, w, 3]`, scaled from the size of the record.
      found: the detections to draw.
      threshold: their lowest score, which the title says.
    """
    scale, names = image.shape[0] / record.height, classes.names
    boxes = corners([one["bbox"] for one in found])
    labels = np.array([classes.category_ids.index(one["category_id"]) for one in found], int)
    captions = [f"{names[label]} {one['score']:.2f}" for label, one in zip(labels, found)]
    predicted = draw(image, boxes * scale, labels, captions, legible=True)
    true = draw(image, record.boxes * scale, record.labels, [names[label] for label in record.labels], legible=True)
    return [titled(predicted, f"prediction (score >= {threshold:g})"), titled(true, "truth")]


def corners(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Boxes (left, top, width, height) as xyxy: float64 `[n, 4]`."""
    sides = np.array(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], axis=1)


def draw_batch(batch: Batch, names: Sequence[str], most: int) -> np.ndarray:
    """The first images of a batch, at most so many, with their boxes and all of their views side by side."""
    count = len(batch.images) // batch.views
    shown = [place for place in range(count) if batch.records[place] is not None][:most]
    cells = [
        titled(draw_view(batch, place + number * count, names, HEIGHT), ("weak view", "strong view")[number])
        for place in shown
        for number in range(batch.views)
    ]
    return sheet(cells)


def draw_view(batch: Batch, index: int, names: Sequence[str], height: int | None = None) -> np.ndarray:
    """The valid part of an image of a batch with its boxes.

    Args:
      height: to which it is scaled, in pixels; None leaves it as it is.
    """
    rows, columns = batch.sizes[index]
    pixels, valid = np.ascontiguousarray(batch.images[index, :rows, :columns]), batch.valid[index]
    if height is not None:
        pixels = scaled(pixels, height)[0]
    center, size = np.split(batch.boxes[index][valid] * [*pixels.shape[1::-1], *pixels.shape[1::-1]], 2, axis=1)
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1)
    labels = batch.labels[index][valid]
    return draw(pixels, boxes, labels, [names[label] for label in labels], legible=height is not None)


def sheet(cells: Sequence[np.ndarray]) -> np.ndarray:
    """One picture of images of one height, `PER_ROW` in a row."""
    rows = [cells[start : start + PER_ROW] for start in range(0, len(cells), PER_ROW)]
    return np.ascontiguousarray(contact_sheet(rows, cells[0].shape[0]))
