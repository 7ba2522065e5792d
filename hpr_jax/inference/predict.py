"""Annotated pictures, videos and a JSON of detections for files and folders of images and videos."""

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.data.images import UnreadableImageError, read_image
from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.drawing import encode_image
from hpr_jax.inference.find_inputs import find_inputs
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.inference.load import load
from hpr_jax.inference.predict_video import LINES, Look, predict_video
from hpr_jax.inference.predictions_file import FreePaths, PredictionsFile, image_entry
from hpr_jax.inference.tiles import Tiling
from hpr_jax.inference.video import VIDEO, UnreadableVideoError, is_video
from hpr_jax.runtime.console import interruptible
from hpr_jax.runtime.files import write_whole
from hpr_jax.runtime.threads import InBackground, ahead
from hpr_jax.weights.hub import is_hub
from hpr_jax.weights.source import is_exported

log = logging.getLogger("hpr_jax")

# The suffix of the pictures that are written.
PICTURES = ".jpg"
# Images that are decoded before they are looked at, and images that wait for being drawn; as many threads do either.
AHEAD = 4


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
    batch: int = 1,
    track: bool = False,
    every: int = 1,
) -> None:
    """Writes a picture of each image with its detections, and `predictions.json` with boxes in pixels of the images; of each
    video, a video and lines of JSON, see `predict_video`.

    What goes wrong with one file is reported, and the file skipped. No file is written over but those of an earlier call.
    `predictions.json` is complete whenever it is looked at, and has what was found so far if the process is ended. Files are
    read and written in threads while the detector works.

    Args:
      checkpoint: a checkpoint's directory, a run's workdir, or published weights; see `open_source`.
      inputs: files of images and videos, and folders of them.
      output: folder for the pictures, the videos and the JSON files.
      threshold: lowest score of the detections.
      overrides: settings (dotted key, text) in place of the checkpoint's.
      config: in place of the checkpoint's; its model must be the same.
      recursive: takes files of folders in the folders, too.
      tiling: looks at images tile by tile.
      batch: images, or frames of a video, that the detector looks at together.
      track: gives the objects of a video numbers that they keep.
      every: looks at each so many-th frame of a video.

    Raises:
      UserError: there is no checkpoint or no file, no file can be processed, or predictions.json is another's.
      OSError: the results cannot be written.
    """
    result = PredictionsFile(output)
    # What an earlier call wrote into a folder is no input of it.
    found = find_inputs(inputs, recursive=recursive)
    files = [file for file in found if file in inputs or file.resolve() not in result.earlier]
    if not files:
        raise UserError(f"All inputs are files that predict wrote, by {result.path}; choose another --output.")
    settings = dict(overrides)
    # An exported detector has batches of its own.
    if batch > 1 and (is_hub(checkpoint) or not is_exported(Path(checkpoint))):
        settings["evaluate.batch_size"] = str(batch)
    detector = load(checkpoint, overrides=settings, config=config)
    free = FreePaths(output, {file.resolve() for file in files}, result.earlier)
    job = _Job(detector, tiling, Look(threshold, track, every, batch), result, free)
    with interruptible(), tqdm(total=len(files), desc="prediction", unit="file") as progress:
        try:
            for of_videos, some in itertools.groupby(files, is_video):
                # An interrupt here, too, waits for the pictures that are being drawn.
                look = job.videos if of_videos else job.images
                with contextlib.closing(look(some)) as done:
                    for _ in done:
                        progress.update()
        finally:
            if result.images or result.videos:
                result.write()
    if not result.images and not result.videos:
        raise UserError(f"None of the {len(files)} files could be processed; the lines above say why.")
    videos = f", {len(result.videos)} videos" if result.videos else ""
    log.info("Wrote %d pictures%s and %s; %d files skipped.", len(result.images), videos, result.path, len(result.skipped))


@dataclasses.dataclass(frozen=True)
class _Skipped:
    """A file that something was wrong with; the error says what."""

    file: Path
    error: BaseException


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is to be done with each file."""

    detector: ImageDetector
    tiling: Tiling | None
    look: Look
    result: PredictionsFile
    free: FreePaths

    def videos(self, files: Iterable[Path]) -> Generator[None, None, None]:
        """Looks at videos, one after the other."""
        for file in files:
            video, lines = self.free.take(file, (VIDEO, LINES))
            try:
                outcome = predict_video(file, video, lines, self._detect, self.look)
            except OSError:
                raise
            except Exception as error:
                self._skip(_Skipped(file, error))
            else:
                for problem in outcome.problems:
                    log.warning("%s: %s.", file, problem)
                self.result.videos.append(outcome.entry)
                self.result.write()
                if outcome.stop:
                    raise outcome.stop
            yield

    def images(self, files: Iterable[Path]) -> Generator[None, None, None]:
        """Looks at images. What becomes of each is noted in the order of the files, when its picture is written."""
        count = 1 if self.tiling else AHEAD
        threads = min(count, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as reading, ThreadPoolExecutor(threads) as writing:
            written = InBackground[dict[str, Any] | _Skipped](writing, self._note, count + self.look.batch)
            read = ahead(reading, self._read, files, count + self.look.batch)
            try:
                while some := list(itertools.islice(read, self.look.batch)):
                    outcomes = [future.exception() or future.result() for _, future in some]
                    found = iter(self._find([one for one in outcomes if isinstance(one, np.ndarray)]))
                    for (file, _), outcome in zip(some, outcomes):
                        one = next(found) if isinstance(outcome, np.ndarray) else outcome
                        if isinstance(one, Detections):
                            written.submit(_write, file, self.free.take(file, [PICTURES])[0], one)
                        else:
                            written.submit(_Skipped, file, one)
                        yield
            finally:
                written.finish()

    def _read(self, file: Path) -> np.ndarray:
        return read_image(file, self.detector.config.data.image_bits)

    def _find(self, images: list[np.ndarray]) -> list[Detections | Exception]:
        """What is found in each of some images, or why nothing can be."""
        try:
            return [*self._detect(images, self.look.threshold)]
        except Exception as error:
            # One image may have spoilt its batch.
            return [error] if len(images) == 1 else [one for image in images for one in self._find([image])]

    def _detect(self, images: list[np.ndarray], threshold: float) -> list[Detections]:
        if self.tiling:
            return [self.detector.in_tiles(image, self.tiling, threshold) for image in images]
        if self.look.batch == 1:
            return [self.detector(image, threshold) for image in images]
        return self.detector(images, threshold) if images else []

    def _note(self, outcome: dict[str, Any] | _Skipped) -> None:
        if isinstance(outcome, _Skipped):
            self._skip(outcome)
        else:
            self.result.images.append(outcome)
            self.result.write_if_due()

    def _skip(self, skipped: _Skipped) -> None:
        named = isinstance(skipped.error, UnreadableImageError | UnreadableVideoError)
        text = str(skipped.error) if named else f"{skipped.file}: {_first_line(skipped.error)}"
        log.warning("%s; skipped", text)
        self.result.skipped.append(str(skipped.file))


def _write(file: Path, picture: Path, found: Detections) -> dict[str, Any] | _Skipped:
    """Draws and writes the picture of an image; returns what `predictions.json` says about it."""
    try:
        data = encode_image(found.draw(), PICTURES)
    except Exception as error:
        return _Skipped(file, error)
    write_whole(picture, data)
    return image_entry(file, picture, found)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
