"""`predict` of videos with a detector whose boxes are known: times, tracks, files that are written, and damage."""

import importlib.metadata
import json

import clips
import numpy as np
import pytest
import tiny
from pictures import RED, plain, png

from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.load import load
from hpr_jax.inference.predict import predict
from hpr_jax.inference.video import VideoReader

# Thirty frames a second of which one is late, some are missing, and one is there twice, at two times.
TICKS = [7, 3000, 6500, 9000, 12_000, 15_000, 42_000, 45_000, 48_000]
STEPS = [0, 1, 2, 3, 4, 4, 14, 15, 16]


class Finder:
    """A stand-in for a detector that finds the squares of `clips` by their colours."""

    config = tiny.config()

    def __init__(self):
        self.calls, self.thresholds, self.fails_at = [], set(), {}

    def __call__(self, images, threshold):
        several = isinstance(images, list)
        self.thresholds.add(threshold)
        self.calls.append(len(images) if several else 1)
        if len(self.calls) in self.fails_at:
            raise self.fails_at[len(self.calls)]
        found = [self._find(image) for image in (images if several else [images])]
        return found if several else found[0]

    def _find(self, image):
        boxes = []
        for channel in (0, 2):
            rows, columns = np.nonzero((image[..., channel] > 150) & (image[..., 1] < 100))
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 1, 1])
        scores, labels = np.array([0.9, 0.8], np.float32), np.array([2, 0])
        return Detections(image, np.array(boxes, np.float32), scores, labels, ["hat", "cup"], [9, 2])


@pytest.fixture
def finder(monkeypatch):
    finder = Finder()
    monkeypatch.setattr("hpr_jax.inference.predict.load", lambda *_, **__: finder)
    return finder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path):
    return clips.write_clip(path, TICKS, frames=[clips.picture(step) for step in STEPS])


@pytest.mark.parametrize("batch", [1, 4])
def test_tracks_and_times(finder, tmp_path, batch):
    clip = write(tmp_path / "clip.mp4")
    predict(tmp_path, [clip], tmp_path / "out", 0.5, batch=batch, track=True)
    assert finder.calls == ([1] * 9 if batch == 1 else [4, 4, 1])
    assert finder.thresholds == {0.1}
    written = lines(tmp_path / "out/clip.jsonl")
    assert [line["time"] for line in written] == [float(ticks * clips.TICK) for ticks in TICKS]
    assert [line["frame"] for line in written] == list(range(9))
    assert clips.times(tmp_path / "out/clip.mp4") == clips.times(clip) == [ticks * clips.TICK for ticks in TICKS]
    for number, (line, step) in enumerate(zip(written, STEPS)):
        assert [one["track"] for one in line["detections"]] == ([1, 2] if number else [None, None])
        assert [one["name"] for one in line["detections"]] == ["hat", "cup"]
        np.testing.assert_allclose([one["box"] for one in line["detections"]], clips.boxes(step), atol=1.5)
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    out = tmp_path / "out"
    assert content == {
        "images": [],
        "videos": [
            {
                "file": str(clip),
                "video": str(out / "clip.mp4"),
                "lines": str(out / "clip.jsonl"),
                "width": 64,
                "height": 48,
                "frames": 9,
                "complete": True,
            }
        ],
        "skipped": [],
    }
    assert sorted(path.name for path in out.iterdir()) == ["clip.jsonl", "clip.mp4", "predictions.json"]
    # Boxes are drawn, in the colours of their tracks from the second frame on.
    first, *_, last = clips.pixels(out / "clip.mp4")
    assert np.abs(first.astype(int) - clips.picture(0)).max() > 100
    assert np.abs(last.astype(int) - clips.picture(16)).max() > 100


def test_detections_alone(finder, tmp_path):
    predict(tmp_path, [write(tmp_path / "clip.mp4")], tmp_path / "out", 0.85, every=2)
    written = lines(tmp_path / "out/clip.jsonl")
    assert finder.thresholds == {0.85}
    assert [line["frame"] for line in written] == [0, 2, 4, 6, 8]
    assert clips.times(tmp_path / "out/clip.mp4") == [ticks * clips.TICK for ticks in TICKS[::2]]
    assert set(written[0]["detections"][0]) == {"box", "score", "category_id", "name"}


def test_videos_among_images(finder, tmp_path, caplog):
    """Nothing that others wrote is written over; what an earlier call wrote is no input, and is written over."""
    (tmp_path / "a.png").write_bytes(png(plain(40, 40, RED)))
    clips.write_clip(tmp_path / "b.mp4", TICKS, sound=True)
    (tmp_path / "c.mp4").write_bytes(b"no video")
    (tmp_path / "d.png").write_bytes(png(plain(40, 40, RED)))
    before = (tmp_path / "b.mp4").read_bytes()
    for _ in range(2):
        predict(tmp_path, [tmp_path], tmp_path, 0.5)
        content = json.loads((tmp_path / "predictions.json").read_text())
        assert [entry["picture"] for entry in content["images"]] == [str(tmp_path / name) for name in ("a.jpg", "d.jpg")]
        assert [entry["video"] for entry in content["videos"]] == [str(tmp_path / "b_2.mp4")]
        assert content["skipped"] == [str(tmp_path / "c.mp4")]
        assert (tmp_path / "b.mp4").read_bytes() == before
        names = ["a.jpg", "a.png", "b.mp4", "b_2.jsonl", "b_2.mp4", "c.mp4", "d.jpg", "d.png", "predictions.json"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert f"{tmp_path / 'b.mp4'}: its sound is not copied." in caplog.messages
    assert any(message.startswith(f"{tmp_path / 'c.mp4'} is not a video that can be read") for message in caplog.messages)


def test_ctrl_c_keeps_the_frames_so_far(finder, tmp_path):
    finder.fails_at = {4: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path, [write(tmp_path / "clip.mp4"), write(tmp_path / "other.mp4")], tmp_path / "out", 0.5)
    assert [line["frame"] for line in lines(tmp_path / "out/clip.jsonl")] == [0, 1, 2]
    assert clips.times(tmp_path / "out/clip.mp4") == [ticks * clips.TICK for ticks in TICKS[:3]]
    (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())["videos"]
    assert (entry["frames"], entry["complete"]) == (3, False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.jsonl", "clip.mp4", "predictions.json"]


def test_what_fails_leaves_nothing_behind(finder, tmp_path, caplog):
    finder.fails_at = {4: ValueError("too large\nfor this machine")}
    predict(tmp_path, [write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4")], tmp_path / "out", 0.5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.jsonl", "b.mp4", "predictions.json"]
    assert f"{tmp_path / 'a.mp4'}: too large; skipped" in caplog.messages
    finder.fails_at = {len(finder.calls) + 1: ValueError("too large")}
    with pytest.raises(UserError, match="None of the 1 files could be processed"):
        predict(tmp_path, [tmp_path / "a.mp4"], tmp_path / "more", 0.5)


def test_a_full_disk_ends_it(finder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpr_jax.inference.video.VideoWriter.write", full)
    with pytest.raises(OSError, match="No space left on device"):
        predict(tmp_path, [write(tmp_path / "a.mp4")], tmp_path / "out", 0.5)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_detector_finds_in_a_video_what_it_finds_in_its_frames(trained, tmp_path):
    """By twos, of which the last frame has none, and while others are read and drawn."""
    clip = write(tmp_path / "clip.mp4")
    predict(trained[0], [clip], tmp_path / "out", 0.0, batch=2)
    detector = load(trained[0])
    with VideoReader(clip) as reader:
        frames = list(reader.frames())
    for frame, line in zip(frames, lines(tmp_path / "out/clip.jsonl"), strict=True):
        found = detector(frame.image, 0.0)
        assert [one["name"] for one in line["detections"]] == found.names
        np.testing.assert_allclose([one["box"] for one in line["detections"]], found.boxes, atol=0.02)
    predict(trained[0], [clip], tmp_path / "tracked", 0.0, track=True)
    tracks = [one["track"] for line in lines(tmp_path / "tracked/clip.jsonl") for one in line["detections"]]
    assert 1 in tracks


@pytest.mark.parametrize("name", ["av", "trackers"])
def test_the_libraries_do_not_replace_opencv(name):
    """opencv-python would write its files over those of opencv-python-headless."""
    assert not [line for line in importlib.metadata.requires(name) or () if "opencv" in line]
