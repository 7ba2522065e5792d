"""A video with what a detector finds in its frames, and the same as lines of JSON."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from hpr_jax.inference.detections import Detections
from hpr_jax.inference.drawing import draw
from hpr_jax.inference.predictions_file import detection_entries
from hpr_jax.inference.tracking import LOWEST, Tracker, one_class_each
from hpr_jax.inference.video import Frame, VideoReader, VideoWriter
from hpr_jax.runtime.files import whole_file
from hpr_jax.runtime.threads import InBackground, ahead

# The suffix of the lines of JSON.
LINES = ".jsonl"
# Frames that are decoded before they are looked at, and frames that wait for being drawn.
AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Look:
    """How a video is looked at.

    Attributes:
      threshold: lowest score of the detections.
      track: whether objects get numbers that they keep.
      every: looks at each so many-th frame; the others are left out.
      batch: frames that the detector looks at together.
    """

    threshold: float
    track: bool = False
    every: int = 1
    batch: int = 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was written of a video.

    Attributes:
      entry: what `predictions.json` says about it.
      problems: clauses about what is missing.
      stop: the interrupt by which the video ended before its end, if it did.
    """

    entry: dict[str, Any]
    problems: list[str]
    stop: KeyboardInterrupt | None


def predict_video(
    file: Path, video: Path, lines: Path, detect: Callable[[list[np.ndarray], float], list[Detections]], look: Look
) -> Outcome:
    """Writes a video with the detections drawn, and a line of JSON for each of its frames.

    Each frame is shown at the time of the frame that it was drawn on. Both files appear when they are complete. Ctrl-C ends
    them at the frame that was reached.

    Args:
      file: the video to look at.
      video, lines: the files to write.
      detect: finds objects in images with at least a score; the images of a call have one size.

    Raises:
      UnreadableVideoError: the file is no video, or nothing of it can be decoded.
      UserError: there is no encoder for such frames.
      OSError: a file cannot be written.
    """
    lowest = min(look.threshold, LOWEST) if look.track else look.threshold
    stop = None
    video.parent.mkdir(parents=True, exist_ok=True)
    with (
        VideoReader(file) as reader,
        whole_file(video) as video_file,
        whole_file(lines) as lines_file,
        _Output(video_file, lines_file, reader, look.threshold) as output,
        # The threads end before the files are closed that they read and write.
        ThreadPoolExecutor(1) as reading,
        ThreadPoolExecutor(1) as writing,
        tqdm(total=-(-reader.count // look.every) or None, desc=file.name, unit="frame", leave=False) as progress,
    ):
        written = InBackground[None](writing, lambda _: progress.update() and None, AHEAD + look.batch)
        tracker = Tracker(look.threshold) if look.track else None
        try:
            for frames in _batches(reader.frames(look.every), reading, look.batch):
                for frame, found in zip(frames, detect([frame.image for frame in frames], lowest)):
                    numbers = None
                    if tracker:
                        found = one_class_each(found)
                        numbers = tracker(found, float(frame.time))
                    written.submit(output.write, frame, found, numbers)
        except KeyboardInterrupt as interrupt:
            stop = interrupt
        written.finish()
        if stop and not output.frames:
            raise stop
    height, width = output.size
    entry = {"file": str(file), "video": str(video), "lines": str(lines), "width": width, "height": height}
    entry |= {"frames": output.frames, "complete": not (stop or reader.problems)}
    sound = ["its sound is not copied"] if reader.has_sound else []
    return Outcome(entry, [*reader.problems, *sound], stop)


def _batches(frames: Iterator[Frame], pool: ThreadPoolExecutor, size: int) -> Iterator[list[Frame]]:
    """So many frames at a time, which a thread reads before they are asked for."""
    futures = ahead(pool, lambda _: next(frames, None), itertools.count(), AHEAD + size)
    read = (future.result() for _, future in futures)
    known = itertools.takewhile(lambda frame: frame is not None, read)
    while some := [frame for frame in itertools.islice(known, size) if frame]:
        yield some


class _Output:
    """The video and the lines that are written. A context: when it ends, both files are complete.

    Attributes:
      frames: how many have been written.
      size: (height, width) of the frames.
    """

    def __init__(self, video: Path, lines: Path, reader: VideoReader, threshold: float):
        self._path, self._reader, self._threshold = video, reader, threshold
        self._lines = lines.open("w", encoding="utf-8")
        self._writer: VideoWriter | None = None
        self.frames, self.size = 0, (0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lines:
            if self._writer is not None:
                self._writer.__exit__(kind, error, trace)

    def write(self, frame: Frame, found: Detections, numbers: list[int | None] | None) -> None:
        """Draws and writes what was found in a frame. Of detections with numbers, those count that reach the threshold or
        continue a track."""
        if self._writer is None:
            self.size = frame.image.shape[0], frame.image.shape[1]
            self._writer = VideoWriter(
                self._path, self.size, self._reader.tick, self._reader.rate, self._reader.pixel_aspect
            )
        if numbers is None:
            picture = found.draw()
        else:
            keep = (found.scores >= self._threshold) | np.array([number is not None for number in numbers], bool)
            found, numbers = found.only(keep), [number for number, kept in zip(numbers, keep) if kept]
            picture = _draw_tracks(found, numbers)
        self._writer.write(picture, frame.ticks)
        line = {"frame": frame.number, "time": float(frame.time), "detections": detection_entries(found, numbers)}
        self._lines.write(json.dumps(line) + "\n")
        self.frames += 1


def _draw_tracks(found: Detections, numbers: list[int | None]) -> np.ndarray:
    """The image with boxes in the colours of their tracks; those without one have one colour."""
    captions = [
        f"{name} {score:.2f}" if number is None else f"#{number} {name} {score:.2f}"
        for name, score, number in zip(found.names, found.scores, numbers)
    ]
    return draw(found.image, found.boxes, np.array([number or 0 for number in numbers], int), captions)
