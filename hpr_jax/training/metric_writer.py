"""Writes the numbers of a run, as JSON lines and for TensorBoard."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TextIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar

from hpr_jax.errors import RunError
from hpr_jax.runtime.files import write_whole


class Sink(Protocol):
    """Another place for the numbers of a run. It raises no errors."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricWriter:
    """Writes numbers to `metrics.jsonl` and to TensorBoard event files in one directory.

    Args:
      workdir: None writes nothing: of several processes, the main one alone writes.
      start: the step that the run goes on from. What was written of later steps is dropped, since they are taken again.
      sink: takes the numbers, too.
    """

    def __init__(self, workdir: Path | None, start: int = 0, sink: Sink | None = None):
        self._file: TextIO | None = None
        self._workdir, self._sink = workdir, sink
        if workdir is None:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _drop_later(path, start)
        self._file = path.open("a")
        # tensorboardX's usual writer has a thread that holds events back for minutes, and blocks its caller when the disk
        # is full.
        self._board = EventsWriter(str(workdir / "events"))
        self._put(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            # Nothing is lost if closing fails: everything was flushed when it was written.
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._board.close()
        if self._sink is not None:
            self._sink.close()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the numbers of a step.

        Raises:
          RunError: they cannot be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(step, error) from error
        if self._sink is not None:
            self._sink.write(step, numbers)
        self.write_board(step, numbers)

    def write_board(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes numbers of a step to TensorBoard alone; raises as `write` does."""
        if self._file is None:
            return
        try:
            for name, value in numbers.items():
                self._put(Event(step=step, summary=scalar(name, value)))
            self._board.flush()
        except OSError as error:
            raise self._failure(step, error) from error

    def write_image(self, step: int, name: str, data: bytes, height: int, width: int) -> None:
        """Writes a picture of a step, the content of a PNG or JPEG file, to TensorBoard; raises as `write` does."""
        if self._file is None:
            return
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        try:
            self._put(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))
            self._board.flush()
        except OSError as error:
            raise self._failure(step, error) from error

    def _failure(self, step: int, error: OSError) -> RunError:
        return RunError(
            f"The metrics of step {step} cannot be written to {self._workdir}: {error.strerror}. The same command goes on "
            "from the latest checkpoint."
        )

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        self._board.write_event(event)


def _drop_later(path: Path, start: int) -> None:
    """Drops the lines of steps after `start`, and half a line that a killed process may have left."""
    if not path.exists():
        return
    earlier = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            is_earlier = json.loads(line)["step"] <= start
        except (ValueError, KeyError, TypeError):
            continue
        if is_earlier:
            earlier.append(line + "\n")
    write_whole(path, "".join(earlier).encode())
