"""Drawn videos, whose frames, times and objects tests choose."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from pictures import BLUE, RED

# (height, width) of the frames.
SIZE = (48, 64)
TICK = Fraction(1, 90_000)
# Two squares that move towards one another in different rows: (left, top) in the first frame, pixels a frame, colour.
SQUARES = (((4, 4), (1, 0), RED), ((46, 28), (-1, 0), BLUE))
SIDE = 12


def boxes(step: float) -> np.ndarray:
    """The xyxy boxes of the squares after so many steps, float32 `[2, 4]`."""
    corners = [np.add(start, np.multiply(step, move)) for start, move, _ in SQUARES]
    return np.array([[*corner, *(corner + SIDE)] for corner in corners], np.float32)


def picture(step: float, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A frame, RGB uint8 `[*size, 3]`."""
    image = np.full((*size, 3), 200, np.uint8)
    for (left, top, right, bottom), (*_, colour) in zip(boxes(step).round().astype(int), SQUARES):
        image[top:bottom, left:right] = colour
    return image


def write_clip(
    path: Path,
    ticks: Sequence[int],
    *,
    frames: Sequence[np.ndarray] | None = None,
    tick: Fraction = TICK,
    codec: str = "libx264",
    rotation: int = 0,
    sound: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a video whose frames are shown at the given ticks, in the format that the suffix names.

    Args:
      frames: the pictures; by default those of the moving squares, a step for each frame.
      tick: seconds of a tick. MP4 keeps any, Matroska milliseconds alone.
      rotation: degrees counterclockwise by which players turn the frames.
      sound: adds a silent second.
    """
    frames = [picture(step) for step in range(len(ticks))] if frames is None else frames
    height, width = frames[0].shape[:2] if len(frames) else SIZE
    clock = {"movie_timescale": str(tick.denominator)} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options={**clock, **(options or {})}) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = tick
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            noise = container.add_stream("aac", rate=8000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 8000, 0
        container.start_encoding()
        for image, at in zip(frames, ticks):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = at, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            container.mux(noise.encode(silence))
            container.mux(noise.encode())
    return path


def times(path: Path) -> list[Fraction]:
    """When the frames of a video are shown, in seconds."""
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def pixels(path: Path) -> list[np.ndarray]:
    """The frames of a video as they are stored."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
