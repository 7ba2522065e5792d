"""Pictures with boxes. Images are RGB uint8 `[h, w, 3]`."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import supervision as sv

# OpenCV draws and writes BGR; supervision's colours follow it.
_BGR = cv2.COLOR_RGB2BGR


def draw(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """A copy of `image` with xyxy `boxes` `[n, 4]` in the colours of their `labels` `[n]`, and captions."""
    height, width = image.shape[:2]
    picture = cv2.cvtColor(image, _BGR)
    if len(boxes):
        found = sv.Detections(xyxy=np.asarray(boxes, np.float32), class_id=np.asarray(labels, int))
        resolution = (width, height)
        thickness = max(1, sv.calculate_optimal_line_thickness(resolution) - 1)
        scale = min(sv.calculate_optimal_text_scale(resolution), 0.6)
        picture = sv.BoxAnnotator(thickness=thickness).annotate(picture, found)
        label = sv.LabelAnnotator(text_scale=scale, text_thickness=1, text_padding=2)
        picture = label.annotate(picture, found, labels=list(captions))
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], height: int = 256, gap: int = 4) -> np.ndarray:
    """Images in rows, all scaled to one height; rows are padded with white to the widest."""
    lines = []
    for row in rows:
        cells = [cv2.resize(cell, (round(cell.shape[1] * height / cell.shape[0]), height)) for cell in row]
        cells = [np.pad(cell, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for cell in cells]
        lines.append(np.concatenate(cells, axis=1))
    width = max(line.shape[1] for line in lines)
    return np.concatenate(
        [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    )


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes an image in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(image, _BGR)):
        raise OSError(f"{path} could not be written")
