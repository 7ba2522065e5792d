"""Videos, read and written frame by frame with the times of their frames. The library `av` (PyAV, which is FFmpeg) is in the
extra `video`.

OpenCV reads videos, too, but does not write the times of frames: where some are missing or not evenly spaced, all that
follow would be shown at other times than before.
"""

import dataclasses
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from hpr_jax.data import images
from hpr_jax.data.images import MOST_PIXELS, open_without_waiting
from hpr_jax.errors import UserError
from hpr_jax.inference.video_extra import library

# Suffixes of the files in a folder that are taken for videos.
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp"),
    ".ogv",
)
# The suffix of the videos that are written.
VIDEO = ".mp4"
# What files of videos begin with: Matroska and WebM, FLV, Windows Media, Ogg, MPEG.
_BEGINNINGS = (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"OggS", b"\x00\x00\x01\xba")
# Kinds of MP4's boxes that are images: HEIF and AVIF.
_IMAGES = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
# What FFmpeg may take a file for. Others, such as playlists, name files and addresses that it would read, too.
_FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"
# Encoders from the best. FFmpeg may be built without the first.
_ENCODERS = {"libx264": {"preset": "veryfast", "crf": "20", "bf": "0"}, "mpeg4": {"qscale": "3"}}
# Marks of frames in the colours of BT.709 with the narrow range, which is what players expect.
_BT709, _NARROW = 1, 1


class UnreadableVideoError(Exception):
    """A file is no video, or nothing of it can be decoded."""


def is_video(path: Path) -> bool:
    """Whether a file is a video, as its suffix says, or, where that says nothing, its first bytes."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (suffix not in images.SUFFIXES and _begins_as_video(path))


def _begins_as_video(path: Path) -> bool:
    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            start = file.read(189) or b""
    except (OSError, ValueError):
        # Whoever reads the file says what is wrong with it.
        return False
    boxes = start[4:8] == b"ftyp" and start[8:12] not in _IMAGES
    riff = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    transport = start[:1] == start[188:] == b"G"
    return start.startswith(_BEGINNINGS) or boxes or riff or transport


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
      number: how many frames were decoded before it.
      ticks: when it is shown, in ticks of the video's clock.
      time: the same in seconds.
      image: RGB uint8 `[h, w, 3]`, turned as it is to be shown.
    """

    number: int
    ticks: int
    time: Fraction
    image: np.ndarray


class VideoReader:
    """The frames of a video. A context, which closes the file.

    Times are those of the file. In formats whose clocks begin anywhere, such as transport streams of MPEG, they count from
    the beginning of the file.

    Attributes:
      tick: seconds of a tick of the clock.
      rate: frames a second on average.
      pixel_aspect: width of a pixel by its height.
      count: how many frames the header says there are, 0 if it does not.
      has_sound: whether there is sound beside the pictures.
      problems: clauses about what was wrong with what has been read so far.

    Raises:
      UnreadableVideoError: the file is no video.
    """

    def __init__(self, path: Path):
        self._path, self._av = path, library("av")
        self.problems: list[str] = []
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        try:
            self._container = self._av.open(str(path), metadata_errors="replace", options=options)
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise UnreadableVideoError(f"{path} is not a video that can be read: {_reason(error)}") from error
        try:
            self._stream = self._pictures()
        except UnreadableVideoError:
            self._container.close()
            raise
        stream = self._stream
        # Threads that decode several frames at once would lose the whole ones beside a damaged one.
        stream.thread_type = "SLICE"
        self.tick = Fraction(stream.time_base or Fraction(1, 1000))
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        self.count = stream.frames
        self.has_sound = bool(self._container.streams.audio)
        arbitrary = bool(self._container.format.flags & self._av.format.Flags.ts_discont.value)
        starts = [s.start_time * s.time_base for s in self._container.streams if arbitrary and s.start_time is not None]
        self._begin = round(min(starts, default=Fraction(0)) / self.tick)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._container.close()

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """All frames that can be decoded, or each so many-th, in the order in which they are shown.

        Frames of one video have one size: where its size changes, frames are scaled to the first one's. What cannot be
        decoded is left out, and does not shift the times of the others.

        Raises:
          UnreadableVideoError: there is no frame.
        """
        period = max(1, round(1 / self.rate / self.tick))
        last, end, size, late = None, 0, None, 0
        for number, frame in enumerate(self._decoded()):
            ticks = frame.pts if frame.pts is not None else frame.dts
            ticks = end if ticks is None else ticks - self._begin
            if last is not None and ticks <= last:
                late += 1
                continue
            last, end = ticks, ticks + max(period, frame.duration or 0)
            size = size or (frame.width, frame.height)
            if number % every == 0:
                yield Frame(number, ticks, ticks * self.tick, _pixels(frame, size))
        if late:
            self.problems.append(f"frames that are not shown later than the one before them are left out ({late})")
        if last is None:
            why = "; ".join(self.problems) or "it is empty"
            raise UnreadableVideoError(f"{self._path} has no frame that can be decoded: {why}")
        self._check_length(end)

    def _pictures(self) -> Any:
        """The stream of moving pictures.

        Raises:
          UnreadableVideoError: there is none, or its pictures are too large.
        """
        cover = self._av.stream.Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not streams:
            raise UnreadableVideoError(f"{self._path} holds no moving pictures")
        stream = streams[0]
        if stream.codec_context is None:
            raise UnreadableVideoError(f"{self._path} is in a code that this FFmpeg cannot decode")
        if stream.width * stream.height > MOST_PIXELS:
            raise UnreadableVideoError(
                f"{self._path} has frames of {stream.width}x{stream.height} pixels, and an image may have {MOST_PIXELS:,}"
            )
        return stream

    def _decoded(self) -> Iterator[Any]:
        """All frames that can be decoded, as the library has them."""
        damaged = 0
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except (self._av.FFmpegError, OSError) as error:
                self.problems.append(f"its end is damaged or missing ({_reason(error)}); the frames before it are kept")
                packet = None
            try:
                # At the end, the decoder gives what it has kept.
                yield from self._stream.decode(packet)
            except EOFError:
                break
            except self._av.FFmpegError:
                damaged += 1
            if packet is None:
                break
        if damaged:
            self.problems.append(f"frames are missing, since packets are damaged ({damaged}); the others keep their times")

    def _check_length(self, end: int) -> None:
        """Notes that a video whose frames end at so many ticks is shorter than its header says."""
        stream, few = self._stream, 2 / self.rate
        if stream.duration is not None:
            promised = ((stream.start_time or 0) + stream.duration - self._begin) * self.tick
        else:
            promised = Fraction(self._container.duration or 0, 1_000_000)
            # Sound may go on for a while.
            few = max(few, Fraction(1)) if self.has_sound else few
        if promised - end * self.tick > few:
            shown = float(end * self.tick)
            self.problems.append(f"its frames end at {shown:.2f} s, and its header says {float(promised):.2f} s")


class VideoWriter:
    """Writes an MP4 file of frames with times of their own. A context: when it ends, the file is complete.

    Args:
      path: of the file, whatever its suffix is.
      size: (height, width) of the frames.
      tick: seconds of a tick of the clock that counts times.
      rate: about how many frames there are in a second.
      pixel_aspect: width of a pixel by its height.

    Raises:
      UserError: there is no encoder for such frames.
      OSError: the file cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], tick: Fraction, rate: Fraction, pixel_aspect: Fraction):
        self._av, (height, width) = library("av"), size
        name = next((name for name in _ENCODERS if name in self._av.codecs_available), "mpeg4")
        # By a file of Python, whose errors are those of the system.
        self._file: io.BufferedIOBase = path.open("w+b")
        # The clock of the whole file counts milliseconds by default, to which the time of the first frame would be rounded.
        options = {"movie_timescale": str(tick.denominator), "movflags": "+faststart"}
        try:
            self._container = self._av.open(self._file, "w", format="mp4", options=options)
            self._stream = self._container.add_stream(name, rate=rate, options=_ENCODERS[name])
            # Colours are stored for squares of four pixels.
            self._stream.width, self._stream.height, self._stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            coder = self._stream.codec_context
            coder.time_base = self._stream.time_base = tick
            coder.sample_aspect_ratio = pixel_aspect
            coder.colorspace = coder.color_primaries = coder.color_trc = _BT709
            coder.color_range = _NARROW
            self._container.start_encoding()
        except (self._av.FFmpegError, ValueError) as error:
            self._file.close()
            raise UserError(f"A video of {width}x{height} pixels cannot be written: {_reason(error)}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._container.mux(self._stream.encode())
                self._container.close()
        finally:
            self._file.close()

    def write(self, image: np.ndarray, ticks: int) -> None:
        """Adds a frame, RGB uint8 `[h, w, 3]`, that is shown at so many ticks; they grow from frame to frame."""
        height, width = image.shape[:2]
        even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if (height | width) & 1 else image
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = ticks, self._stream.codec_context.time_base
        self._container.mux(self._stream.encode(frame))


def _pixels(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """RGB uint8 `[h, w, 3]` of a frame as it is to be shown. Sizes are (width, height) as it is stored."""
    scaled = {} if (frame.width, frame.height) == size else {"width": size[0], "height": size[1]}
    pixels = frame.to_ndarray(format="rgb24", **scaled)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _reason(error: Exception) -> str:
    """What went wrong, without the name of the file that the libraries add."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]
