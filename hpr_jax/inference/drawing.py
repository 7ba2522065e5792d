"""Pictures with boxes. Images are RGB uint8 `[h, w, 3]`."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from hpr_jax.errors import UserError
from hpr_jax.runtime.files import write_whole

# The scale of captions, as OpenCV counts it, that can be read easily.
LEGIBLE = 0.42


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    captions: Sequence[str],
    colours: Sequence[str] | None = None,
    *,
    legible: bool = False,
) -> np.ndarray:
    """A copy of an image with boxes on it.

    Args:
      boxes: xyxy in pixels `[n, 4]`.
      labels: int `[n]`; boxes of one label have one colour.
      captions: text at each box.
      colours: of the labels, like `#ff0000`; None takes supervision's.
      legible: whether captions are large also in small images, and moved where they leave the image or cover one another.
    """
    # Imported here, since it takes a second, and much does without pictures.
    import supervision as sv

    height, width = image.shape[:2]
    # supervision draws on BGR, as OpenCV does.
    picture = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8)
    if len(boxes):
        detections = sv.Detections(xyxy=np.asarray(boxes, np.float32), class_id=np.asarray(labels, int))
        resolution = (width, height)
        thickness = max(1, sv.calculate_optimal_line_thickness(resolution) - 1)
        scale = min(sv.calculate_optimal_text_scale(resolution), 0.6)
        palette = sv.ColorPalette.DEFAULT if colours is None else sv.ColorPalette.from_hex(list(colours))
        picture = sv.BoxAnnotator(palette, thickness).annotate(picture, detections)
        scale = max(scale, LEGIBLE) if legible else scale
        label = sv.LabelAnnotator(palette, text_scale=scale, text_thickness=1, text_padding=2, smart_position=legible)
        picture = label.annotate(picture, detections, labels=list(captions))
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def scaled(image: np.ndarray, height: int) -> tuple[np.ndarray, float]:
    """An image at another height, and the factor by which it was scaled. What is drawn afterwards can be read whatever the
    size of the image was."""
    factor = height / image.shape[0]
    width = max(1, round(image.shape[1] * factor))
    shrinks = factor < 1
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), factor


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """An image below a white strip with a title in it."""
    strip = np.full((24, image.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, title, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
    return np.concatenate([strip, image])


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], height: int = 256, gap: int = 4) -> np.ndarray:
    """One picture of many images.

    Args:
      rows: images in rows.
      height: to which each image is scaled, in pixels.
      gap: white border around each image, in pixels.

    Returns:
      The rows below one another, padded with white to the widest.
    """
    lines = []
    for row in rows:
        cells = [cv2.resize(cell, (round(cell.shape[1] * height / cell.shape[0]), height)) for cell in row]
        cells = [np.pad(cell, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for cell in cells]
        lines.append(np.concatenate(cells, axis=1))
    width = max(line.shape[1] for line in lines)
    return np.concatenate(
        [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    )


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """The content of an image file, in the format that a suffix names.

    Raises:
      UserError: there is no such format, or it has no images of this size.
    """
    try:
        encoded, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error:
        encoded = False
    if not encoded:
        height, width = image.shape[:2]
        raise UserError(f"A picture of {width}x{height} pixels cannot be written as {suffix or 'a file without a suffix'}.")
    return data.tobytes()


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes an image in the format that the path's suffix names; raises what `encode_image` and `write_whole` raise."""
    write_whole(path, encode_image(image, path.suffix))
