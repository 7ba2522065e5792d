"""Annotated pictures and a JSON of detections for files and folders of images."""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.data.images import UnreadableImageError, read_image
from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.drawing import encode_image
from hpr_jax.inference.find_images import find_images
from hpr_jax.inference.load import load
from hpr_jax.inference.tiles import Tiling
from hpr_jax.runtime.console import interruptible
from hpr_jax.runtime.files import write_whole

log = logging.getLogger("hpr_jax")

# The suffix of the pictures that are written.
PICTURES = ".jpg"
# Seconds between two times that predictions.json is written.
INTERVAL = 2.0


def predict(
    checkpoint: str | Path,
    inputs: Sequence[Path],
    output: Path,
    threshold: float,
    overrides: Sequence[tuple[str, str]] = (),
    config: ConfigDict | None = None,
    *,
    recursive: bool = False,
    tiling: Tiling | None = None,
) -> None:
    """Writes a picture of each image with its detections, and `predictions.json` with boxes in pixels of the images.

    What goes wrong with one image is reported, and the image skipped. No file is written over but those of an earlier call.
    `predictions.json` is complete whenever it is looked at, and has what was found so far if the process is ended.

    Args:
      checkpoint: a checkpoint's directory, a run's workdir, or published weights; see `open_source`.
      inputs: image files, and folders of images.
      output: folder for the pictures and the JSON file.
      threshold: lowest score of the detections.
      overrides: settings (dotted key, text) in place of the checkpoint's.
      config: in place of the checkpoint's; its model must be the same.
      recursive: takes images of folders in the folders, too.
      tiling: looks at images tile by tile.

    Raises:
      UserError: there is no checkpoint or no image, no image can be processed, or predictions.json is another's.
      OSError: the results cannot be written.
    """
    result = _PredictionsFile(output)
    # Pictures that an earlier call wrote into a folder are no images of it.
    images = find_images(inputs, recursive=recursive)
    files = [file for file in images if file in inputs or file.resolve() not in result.earlier]
    if not files:
        raise UserError(f"All images are pictures that predict wrote, by {result.path}; choose another --output.")
    detector = load(checkpoint, overrides=dict(overrides), config=config)
    bits = detector.config.data.image_bits
    # The paths of images, and of the pictures of this call.
    taken = {file.resolve() for file in files}
    with interruptible():
        try:
            for file in tqdm(files, desc="prediction", unit="image"):
                try:
                    pixels = read_image(file, bits)
                    found = detector.in_tiles(pixels, tiling, threshold) if tiling else detector(pixels, threshold)
                    data = encode_image(found.draw(), PICTURES)
                except Exception as error:
                    text = str(error) if isinstance(error, UnreadableImageError) else f"{file}: {_first_line(error)}"
                    log.warning("%s; skipped", text)
                    result.skipped.append(str(file))
                    continue
                picture = _picture_path(output, file, taken, result.earlier)
                taken.add(picture.resolve())
                write_whole(picture, data)
                result.entries.append(_entry(file, picture, found))
                result.write_if_due()
        finally:
            if result.entries:
                result.write()
    if not result.entries:
        raise UserError(f"None of the {len(files)} images could be processed; the lines above say why.")
    log.info("Wrote %d pictures and %s; %d images skipped.", len(result.entries), result.path, len(result.skipped))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _PredictionsFile:
    """`predictions.json`, written anew at intervals.

    Attributes:
      entries: what it says about each image.
      skipped: the images that something was wrong with.
      earlier: the pictures of the call that wrote the file that is there.
    """

    def __init__(self, output: Path):
        self.path = output / "predictions.json"
        self.entries: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.earlier = self._earlier_pictures()
        self._written = -math.inf

    def _earlier_pictures(self) -> set[Path]:
        if not self.path.exists():
            return set()
        try:
            content = json.loads(self.path.read_bytes())
            return {(self.path.parent / Path(entry["picture"]).name).resolve() for entry in content["images"]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.path} is no file that predict wrote, and would be written over; choose another --output."
            ) from error

    def write_if_due(self) -> None:
        """Writes it unless it was written a short while ago: it grows with each image."""
        if time.monotonic() - self._written > INTERVAL:
            self.write()

    def write(self) -> None:
        content = json.dumps({"images": self.entries, "skipped": self.skipped}, indent=1) + "\n"
        write_whole(self.path, content.encode())
        self._written = time.monotonic()


def _picture_path(output: Path, file: Path, taken: set[Path], earlier: set[Path]) -> Path:
    """A path for the picture of an image, named like the image; numbered if an image, another picture of this call, or a
    file that no earlier call wrote has that path."""
    path, number = output / f"{file.stem}{PICTURES}", 1
    # Names have at most 255 bytes on most file systems.
    stem = os.fsdecode(os.fsencode(file.stem)[:240])
    while path.resolve() in taken or (path.exists() and path.resolve() not in earlier):
        number += 1
        path = output / f"{stem}_{number}{PICTURES}"
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
