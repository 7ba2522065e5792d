"""Videos keep the times, the turning and the size of their frames, and damage costs no whole frame."""

from fractions import Fraction

import clips
import numpy as np
import pytest
from pictures import BLUE, GREEN, RED, plain, png

from hpr_jax.errors import UserError
from hpr_jax.inference import video_extra
from hpr_jax.inference.video import UnreadableVideoError, VideoReader, VideoWriter, is_video

# Uneven times, that begin between two milliseconds, and a gap of half a second.
UNEVEN = [7, 3000, 3001, 9000, 54_000, 57_000]
NOISE = [np.random.default_rng(seed).integers(0, 256, (*clips.SIZE, 3), np.uint8) for seed in range(12)]


def read(path, every=1):
    """The frames of a video, and what was wrong with it."""
    with VideoReader(path) as reader:
        return list(reader.frames(every)), reader.problems


def test_frames_have_the_times_of_the_file(tmp_path):
    frames, problems = read(clips.write_clip(tmp_path / "x.mp4", UNEVEN))
    assert [frame.ticks for frame in frames] == UNEVEN
    assert [frame.time for frame in frames] == [ticks * clips.TICK for ticks in UNEVEN]
    assert [frame.number for frame in frames] == [0, 1, 2, 3, 4, 5]
    assert problems == []
    for step, frame in enumerate(frames):
        assert np.abs(frame.image.astype(int) - clips.picture(step)).mean() < 3


def test_each_so_many_th_frame(tmp_path):
    frames, _ = read(clips.write_clip(tmp_path / "x.mp4", UNEVEN), every=2)
    assert [(frame.number, frame.ticks) for frame in frames] == [(0, 7), (2, 3001), (4, 54_000)]


def test_a_clock_that_begins_anywhere_counts_from_the_beginning(tmp_path):
    frames, _ = read(clips.write_clip(tmp_path / "x.ts", [900_000 + ticks for ticks in (0, 3000, 90_000)]))
    assert [frame.ticks for frame in frames] == [0, 3000, 90_000]


@pytest.mark.parametrize("tick", [Fraction(1, 90_000), Fraction(1001, 30_000), Fraction(1, 1000), Fraction(1, 12_345)])
def test_times_are_written_exactly(tmp_path, tick):
    with VideoWriter(tmp_path / "x", clips.SIZE, tick, Fraction(30), Fraction(1)) as writer:
        for step, ticks in enumerate(UNEVEN):
            writer.write(clips.picture(step), ticks)
    assert clips.times(tmp_path / "x") == [ticks * tick for ticks in UNEVEN]


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, (200, 120, 40)])
def test_colours_come_back(tmp_path, colour):
    """A side of an odd number of pixels gets one more."""
    with VideoWriter(tmp_path / "x.mp4", (31, 40), clips.TICK, Fraction(30), Fraction(4, 3)) as writer:
        writer.write(plain(31, 40, colour), 0)
    with VideoReader(tmp_path / "x.mp4") as reader:
        (frame,) = reader.frames()
        assert reader.pixel_aspect == Fraction(4, 3)
    assert frame.image.shape == (32, 40, 3)
    np.testing.assert_allclose(frame.image.reshape(-1, 3).mean(axis=0), colour, atol=4)


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_frames_are_turned(tmp_path, degrees):
    frames, _ = read(clips.write_clip(tmp_path / "x.mp4", [0, 3000], rotation=degrees))
    turned = np.rot90(clips.picture(0), degrees // 90)
    assert frames[0].image.shape == turned.shape
    assert np.abs(frames[0].image.astype(int) - turned).mean() < 3


@pytest.mark.parametrize(("suffix", "tick"), [(".mp4", clips.TICK), (".mkv", Fraction(1, 1000))])
def test_frames_before_a_damaged_end_are_kept(tmp_path, suffix, tick):
    step = round(1 / tick) // 25
    ticks = [step * number for number in range(len(NOISE))]
    options = {"movflags": "+faststart"} if suffix == ".mp4" else {}
    whole = clips.write_clip(tmp_path / f"whole{suffix}", ticks, frames=NOISE, tick=tick, options=options)
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: round(whole.stat().st_size * 0.7)])
    frames, problems = read(cut)
    assert 4 < len(frames) < len(NOISE)
    assert [frame.time for frame in frames] == clips.times(whole)[: len(frames)]
    assert "frames end at 0." in problems[-1]
    assert read(whole)[1] == []


def test_damage_in_the_middle_moves_no_other_frame(tmp_path):
    whole = clips.write_clip(tmp_path / "whole.mp4", range(0, 36_000, 3000), frames=NOISE)
    data = bytearray(whole.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    (tmp_path / "hole.mp4").write_bytes(data)
    frames, problems = read(tmp_path / "hole.mp4")
    assert set(range(0, 36_000, 3000)) > {frame.ticks for frame in frames} >= {0, 33_000}
    assert "packets are damaged" in problems[0]


def test_files_that_are_no_videos(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.avi").write_bytes(b"text " * 100)
    data = bytearray(clips.write_clip(tmp_path / "x.mp4", [0]).read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    (tmp_path / "grey.mp4").write_bytes(data)
    for name, sentence in (
        ("empty.mp4", r"empty\.mp4 is not a video that can be read: "),
        ("text.avi", r"text\.avi is not a video that can be read: "),
        ("none.mp4", r"none\.mp4 is not a video that can be read: No such file"),
        ("grey.mp4", r"grey\.mp4 has no frame that can be decoded: frames are missing, since packets are damaged \(1\)"),
    ):
        with pytest.raises(UnreadableVideoError, match=sentence):
            read(tmp_path / name)


def test_playlists_are_not_followed(tmp_path):
    clips.write_clip(tmp_path / "secret.mp4", range(0, 9000, 3000))
    for text in ("ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(UnreadableVideoError, match="is not a video that can be read"):
            VideoReader(tmp_path / "list.mp4")


def test_sound_alone_and_huge_frames(tmp_path, monkeypatch):
    with VideoReader(clips.write_clip(tmp_path / "x.mp4", [0], sound=True)) as reader:
        assert reader.has_sound
    monkeypatch.setattr("hpr_jax.inference.video.MOST_PIXELS", 48 * 64 - 1)
    with pytest.raises(UnreadableVideoError, match=r"frames of 64x48 pixels, and an image may have 3,071"):
        read(tmp_path / "x.mp4")
    with pytest.raises(UserError, match=r"A video of 100000x10 pixels cannot be written: "):
        VideoWriter(tmp_path / "y.mp4", (10, 100_000), clips.TICK, Fraction(30), Fraction(1))


def test_suffix_or_beginning_tell_videos(tmp_path):
    for suffix, codec, tick in (
        (".mp4", "libx264", clips.TICK),
        (".mkv", "libx264", Fraction(1, 1000)),
        (".avi", "mpeg4", Fraction(1, 25)),
        (".ts", "libx264", clips.TICK),
    ):
        path = clips.write_clip(tmp_path / f"x{suffix}", [0, 1], tick=tick, codec=codec)
        assert is_video(path)
        assert is_video(path.rename(tmp_path / "nameless"))
    (tmp_path / "nameless").write_bytes(png(plain(8, 8, RED)))
    assert not is_video(tmp_path / "nameless")
    assert not is_video(tmp_path / "x.png")
    # The beginning of an image of AVIF is like that of MP4.
    (tmp_path / "nameless").write_bytes(b"\0\0\0\x1cftypavif")
    assert not is_video(tmp_path / "nameless")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'Videos need the package av; install it with pip install "hpr_jax\[video\]"'):
        video_extra.require("av")
    monkeypatch.setitem(__import__("sys").modules, "trackers", None)
    with pytest.raises(UserError, match="--track needs the package trackers"):
        video_extra.library("trackers")
