"""Annotated pictures and a JSON of detections for files and folders of images."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.data.images import UnreadableImageError, read_image
from hpr_jax.errors import UserError
from hpr_jax.inference.drawing import write_image
from hpr_jax.inference.find_images import find_images
from hpr_jax.inference.image_detector import Detections, load

log = logging.getLogger("hpr_jax")


def predict(
    checkpoint: Path,
    inputs: Sequence[Path],
    output: Path,
    threshold: float,
    overrides: Sequence[tuple[str, str]] = (),
    config: ConfigDict | None = None,
) -> None:
    """Writes a picture of each image with its detections, and `predictions.json` with boxes in pixels of the images.

    Images that cannot be read are reported and skipped.

    Args:
      checkpoint: a checkpoint's directory or a run's workdir.
      inputs: image files, and folders of images.
      output: folder for the pictures and the JSON file.
      threshold: lowest score of the detections.
      overrides: settings (dotted key, text) in place of the checkpoint's.
      config: in place of the checkpoint's; its model must be the same.

    Raises:
      UserError: there is no checkpoint or no image, or no image can be read.
    """
    files = find_images(inputs)
    detector = load(checkpoint, overrides=dict(overrides), config=config)
    entries, skipped = [], []
    taken = {file.resolve() for file in files}
    for file in tqdm(files, desc="prediction", unit="image"):
        try:
            image = read_image(file)
        except UnreadableImageError as error:
            log.warning("%s; skipped", error)
            skipped.append(str(file))
            continue
        found = detector(image, threshold)
        picture = _picture_path(output, file, taken)
        taken.add(picture.resolve())
        write_image(picture, found.draw())
        entries.append(_entry(file, picture, found))
    if not entries:
        raise UserError(f"None of the {len(files)} images could be read.")
    result = output / "predictions.json"
    result.write_text(json.dumps({"images": entries, "skipped": skipped}, indent=1) + "\n")
    log.info("Wrote %d pictures and %s; %d images skipped.", len(entries), result, len(skipped))


def _picture_path(output: Path, file: Path, taken: set[Path]) -> Path:
    """A path for the picture of an image, named like the image; numbered if another picture or an image has that path."""
    path, number = output / f"{file.stem}.jpg", 1
    while path.resolve() in taken:
        number += 1
        path = output / f"{file.stem}_{number}.jpg"
    return path


def _entry(file: Path, picture: Path, found: Detections) -> dict[str, Any]:
    """What `predictions.json` says about an image."""
    height, width = found.image.shape[:2]
    return {
        "file": str(file),
        "picture": str(picture),
        "width": width,
        "height": height,
        "detections": [
            {
                "box": [round(float(side), 2) for side in box],
                "score": round(float(score), 4),
                "category_id": category,
                "name": name,
            }
            for box, score, category, name in zip(found.boxes, found.scores, found.category_ids, found.names)
        ],
    }
