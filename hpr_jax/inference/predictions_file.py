"""`predictions.json`: what was found in images, and where the pictures and videos are that show it."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.runtime.files import write_whole

# Seconds between two times that predictions.json is written.
INTERVAL = 2.0
# Keys of an entry that name files which predict wrote.
_WRITTEN = ("picture", "video", "lines")


class PredictionsFile:
    """`predictions.json`, written anew at intervals.

    Attributes:
      images: what it says about each image.
      videos: what it says about each video.
      skipped: the files that something was wrong with.
      earlier: the pictures, videos and lines of the call that wrote the file that is there.

    Raises:
      UserError: the file that is there is another's.
    """

    def __init__(self, output: Path):
        self.path = output / "predictions.json"
        self.images: list[dict[str, Any]] = []
        self.videos: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.earlier = self._earlier_files()
        self._written = -math.inf

    def _earlier_files(self) -> set[Path]:
        if not self.path.exists():
            return set()
        try:
            content = json.loads(self.path.read_bytes())
            entries = [*content["images"], *content.get("videos", [])]
            names = [entry[key] for entry in entries for key in _WRITTEN if key in entry]
            return {(self.path.parent / Path(name).name).resolve() for name in names}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.path} is no file that predict wrote, and would be written over; choose another --output."
            ) from error

    def write_if_due(self) -> None:
        """Writes it unless it was written a short while ago: it grows with each image."""
        if time.monotonic() - self._written > INTERVAL:
            self.write()

    def write(self) -> None:
        """Writes it as it is now."""
        content: dict[str, Any] = {"images": self.images, "videos": self.videos, "skipped": self.skipped}
        if not self.videos:
            del content["videos"]
        write_whole(self.path, (json.dumps(content, indent=1) + "\n").encode())
        self._written = time.monotonic()


@dataclasses.dataclass
class FreePaths:
    """Names in a folder that predict may write to.

    Attributes:
      output: the folder.
      taken: the paths of what is read and of what was written.
      earlier: the files of an earlier call, which may be written over.
    """

    output: Path
    taken: set[Path]
    earlier: set[Path]

    def take(self, file: Path, suffixes: Sequence[str]) -> list[Path]:
        """Paths named like a file, one for each suffix; numbered if an image, another file of this call, or a file that no
        earlier call wrote has one of them."""
        paths, number = [self.output / f"{file.stem}{suffix}" for suffix in suffixes], 1
        # Names have at most 255 bytes on most file systems.
        stem = os.fsdecode(os.fsencode(file.stem)[:240])
        while not all(self._is_free(path) for path in paths):
            number += 1
            paths = [self.output / f"{stem}_{number}{suffix}" for suffix in suffixes]
        self.taken |= {path.resolve() for path in paths}
        return paths

    def _is_free(self, path: Path) -> bool:
        return path.resolve() not in self.taken and (not path.exists() or path.resolve() in self.earlier)


def image_entry(file: Path, picture: Path, found: Detections) -> dict[str, Any]:
    """What `predictions.json` says about an image."""
    height, width = found.image.shape[:2]
    return {
        "file": str(file),
        "picture": str(picture),
        "width": width,
        "height": height,
        "detections": detection_entries(found),
    }


def detection_entries(found: Detections, numbers: Iterable[int | None] | None = None) -> list[dict[str, Any]]:
    """What is written about each detection of an image, and about the number of its track, if there is one."""
    entries = [
        {
            "box": [round(float(side), 2) for side in box],
            "score": round(float(score), 4),
            "category_id": category,
            "name": name,
        }
        for box, score, category, name in zip(found.boxes, found.scores, found.category_ids, found.names)
    ]
    return entries if numbers is None else [{**entry, "track": number} for entry, number in zip(entries, numbers)]
