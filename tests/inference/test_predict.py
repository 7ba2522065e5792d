"""`predict`, with known detections: what it writes, over what it never writes, and what goes wrong with single images."""

import json
import os
import time
import types
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mutations import examples
from pictures import BLUE, GREEN, RED, plain, png

from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.predict import predict

# Names of files, which have at most 255 bytes; some are alike but for the suffix.
STEMS = st.one_of(
    st.binary(min_size=1, max_size=251).filter(lambda name: b"/" not in name and b"\0" not in name),
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60).map(str.encode),
    st.sampled_from(
        [b"a", b"a_2", b"a.jpg", b"other", b"other_2", b"-x", b"~", b" ", b"a b", b"a.b.c", b"\xff", 251 * b"x"]
    ),
)
NAMES = st.builds(bytes.__add__, STEMS, st.sampled_from([b".png", b".PNG"]))


def with_config(find) -> Any:
    """A function that stands for a detector, which has a config."""
    find.config = tiny.config()
    return find


@pytest.fixture
def loaded(monkeypatch):
    """Records the calls of a detector that detects the same two objects in every image."""
    calls = types.SimpleNamespace(loads=[], images=[], thresholds=[])

    def find(image, threshold):
        calls.images.append(image)
        calls.thresholds.append(threshold)
        boxes = np.array([[1.234, 2.345, 30.5, 40], [0, 0, 80, 100]], np.float32)
        scores = np.array([0.87654, 0.5], np.float32)
        return Detections(image, boxes, scores, np.array([2, 0]), ["hat", "cup"], [9, 2])

    def load(*arguments, **settings):
        calls.loads.append((arguments, settings))
        return with_config(find)

    monkeypatch.setattr("hpr_jax.inference.predict.load", load)
    return calls


def test_boxes_scores_and_classes_are_written(loaded, tmp_path):
    (tmp_path / "x.png").write_bytes(png(plain(100, 80, GREEN)))
    tiny.write_turned(tmp_path / "y.jpg", plain(80, 100, RED), 6)
    predict(tmp_path / "run", [tmp_path / "x.png", tmp_path / "y.jpg"], tmp_path / "out", 0.25, [("a.b", "1")], "config")
    assert loaded.loads == [((tmp_path / "run",), {"overrides": {"a.b": "1"}, "config": "config"})]
    assert loaded.thresholds == [0.25, 0.25]
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert content["skipped"] == []
    for entry, file in zip(content["images"], ("x.png", "y.jpg"), strict=True):
        assert entry == {
            "file": str(tmp_path / file),
            "picture": str(tmp_path / f"out/{file[0]}.jpg"),
            "width": 80,
            "height": 100,
            "detections": [
                {"box": [1.23, 2.35, 30.5, 40.0], "score": 0.8765, "category_id": 9, "name": "hat"},
                {"box": [0.0, 0.0, 80.0, 100.0], "score": 0.5, "category_id": 2, "name": "cup"},
            ],
        }


def test_no_image_is_written_over(loaded, tmp_path):
    """The pictures come into the folder of the images."""
    cv2.imwrite(str(tmp_path / "x.jpg"), plain(40, 40, RED))
    (tmp_path / "x.png").write_bytes(png(plain(40, 40, GREEN)))
    before = {name: (tmp_path / name).read_bytes() for name in ("x.jpg", "x.png")}
    predict(tmp_path, [tmp_path], tmp_path, 0.5)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    pictures = [entry["picture"] for entry in json.loads((tmp_path / "predictions.json").read_text())["images"]]
    assert pictures == [str(tmp_path / "x_2.jpg"), str(tmp_path / "x_3.jpg")]


def test_pictures_of_an_earlier_call_are_no_images(loaded, tmp_path):
    (tmp_path / "x.png").write_bytes(png(plain(40, 40, RED)))
    for _ in range(2):
        predict(tmp_path, [tmp_path], tmp_path, 0.5)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.json", "x.jpg", "x.png"]
    # One that is named is taken all the same.
    predict(tmp_path, [tmp_path / "x.jpg"], tmp_path / "other", 0.5)
    assert (tmp_path / "other/x.jpg").is_file()
    (tmp_path / "x.png").unlink()
    with pytest.raises(UserError, match=r"All inputs are files that predict wrote.*choose another --output"):
        predict(tmp_path, [tmp_path], tmp_path, 0.5)


def test_files_of_others_are_not_written_over(loaded, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in/holiday.png").write_bytes(png(plain(40, 40, RED)))
    (tmp_path / "out/holiday.jpg").write_bytes(b"another's")
    for _ in range(2):
        predict(tmp_path, [tmp_path / "in"], tmp_path / "out", 0.5)
        assert (tmp_path / "out/holiday.jpg").read_bytes() == b"another's"
        names = ["holiday.jpg", "holiday_2.jpg", "predictions.json"]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    (tmp_path / "out/predictions.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"predictions\.json is no file that predict wrote.*choose another --output"):
        predict(tmp_path, [tmp_path / "in"], tmp_path / "out", 0.5)
    assert (tmp_path / "out/predictions.json").read_text() == '{"mine": 1}'


def test_what_goes_wrong_with_an_image_stops_no_other(monkeypatch, tmp_path, caplog):
    """At every moment predictions.json is complete, and has the first images; the last one is interrupted."""
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(png(plain(40, 40, RED)))
    result, calls = tmp_path / "out/predictions.json", []

    def find(image, threshold):
        calls.append([entry["file"][-5] for entry in json.loads(result.read_text())["images"]] if result.exists() else [])
        if len(calls) == 2:
            raise ValueError("too large\nfor this machine")
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Detections(image, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int), [], [])

    monkeypatch.setattr("hpr_jax.inference.predict.load", lambda *_, **__: with_config(find))
    monkeypatch.setattr("hpr_jax.inference.predictions_file.INTERVAL", -1.0)
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path, [tmp_path], tmp_path / "out", 0.5)
    assert len(calls) == 4
    assert all(names == ["a", "c"][: len(names)] for names in calls)
    content = json.loads(result.read_text())
    assert [entry["file"][-5] for entry in content["images"]] == ["a", "c"]
    assert content["skipped"] == [str(tmp_path / "b.png")]
    assert f"{tmp_path / 'b.png'}: too large; skipped" in caplog.messages


@pytest.mark.parametrize("batch", [1, 3])
def test_images_stay_in_order(monkeypatch, tmp_path, batch):
    """Whatever takes long, and although a batch with an image that cannot be looked at is looked at one by one."""
    calls = []

    def one(image):
        if image[0, 0, 0] == 5:
            raise ValueError("too large")
        boxes = np.array([[0, 0, image[0, 0, 0], 9]], np.float32)
        return Detections(image, boxes, np.ones(1, np.float32), np.zeros(1, int), ["cup"], [2])

    def find(images, threshold):
        calls.append(len(images) if isinstance(images, list) else 1)
        return [one(image) for image in images] if isinstance(images, list) else one(images)

    def draw(found):
        time.sleep(0.03 if found.boxes[0, 2] % 3 == 0 else 0)
        return found.image

    def load(_, **arguments):
        settings.update(arguments["overrides"])
        return with_config(find)

    settings: dict[str, str] = {}
    monkeypatch.setattr("hpr_jax.inference.predict.load", load)
    monkeypatch.setattr(Detections, "draw", draw)
    for number in range(10):
        data = b"no image" if number == 7 else png(plain(40, 40, (number, 0, 0)))
        (tmp_path / f"{number}.png").write_bytes(data)
    predict(tmp_path, [tmp_path], tmp_path / "out", 0.5, batch=batch)
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    rest = [0, 1, 2, 3, 4, 6, 8, 9]
    assert [Path(entry["picture"]).name for entry in content["images"]] == [f"{number}.jpg" for number in rest]
    assert [entry["detections"][0]["box"][2] for entry in content["images"]] == rest
    assert content["skipped"] == [str(tmp_path / "5.png"), str(tmp_path / "7.png")]
    assert calls == ([1] * 9 if batch == 1 else [3, 3, 1, 1, 1, 2, 1])
    assert settings == ({} if batch == 1 else {"evaluate.batch_size": "3"})


@examples(40, 2000)
@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    beside=st.booleans(),
    again=st.booleans(),
)
def test_any_names(loaded, tmp_path_factory, names, beside, again):
    """Each image gets a picture of its own, whatever its name is; no other file changes."""
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(png(plain(40, 40, RED)))
    output = folder if beside else folder / "out"
    (folder / "other.jpg").write_bytes(b"mine")
    images = [folder / os.fsdecode(name) for name in names]
    for _ in range(1 + again):
        predict(folder, images, output, 0.5)
    content = json.loads((output / "predictions.json").read_text())
    assert [entry["file"] for entry in content["images"]] == [str(image) for image in images]
    pictures = {entry["picture"] for entry in content["images"]}
    assert len(pictures) == len(images)
    assert all(Path(picture).read_bytes()[:2] == b"\xff\xd8" for picture in pictures)
    assert all(image.read_bytes()[1:4] == b"PNG" for image in images)
    assert (folder / "other.jpg").read_bytes() == b"mine"
    assert not any(path.name.endswith(".partial") for path in folder.rglob("*"))


def test_images_of_one_name_keep_pictures_of_their_own(loaded, tmp_path):
    """At the second call, too, which may write over the pictures of the first."""
    for name, colour in (("a", RED), ("b", BLUE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(plain(40, 40, colour)))
    for _ in range(2):
        predict(tmp_path, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", 0.5)
        content = json.loads((tmp_path / "out/predictions.json").read_text())
        assert [Path(entry["picture"]).name for entry in content["images"]] == ["x.jpg", "x_2.jpg"]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.json", "x.jpg", "x_2.jpg"]


def test_names_that_are_no_text(loaded, tmp_path):
    name = os.fsdecode(b"caf\xe9 \xc3\xbc.png")
    (tmp_path / name).write_bytes(png(plain(40, 40, RED)))
    predict(tmp_path, [tmp_path], tmp_path / "out", 0.5)
    assert (tmp_path / "out" / name.replace(".png", ".jpg")).is_file()
    (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert entry["file"] == str(tmp_path / name)


def test_the_network_and_the_reader_see_rgb(loaded, monkeypatch, tmp_path):
    for name, colour in (("red", RED), ("blue", BLUE), ("mixed", (200, 120, 40))):
        (tmp_path / f"{name}.png").write_bytes(png(plain(40, 40, colour)))
    # Nothing is drawn, so that colours can be compared.
    monkeypatch.setattr(Detections, "draw", lambda self: self.image)
    names = ("red", "blue", "mixed")
    predict(tmp_path, [tmp_path / f"{name}.png" for name in names], tmp_path / "out", 0.5)
    assert [image[20, 20].tolist() for image in loaded.images] == [list(RED), list(BLUE), [200, 120, 40]]
    for name, image in zip(names, loaded.images):
        written = cv2.imread(str(tmp_path / f"out/{name}.jpg"))
        assert written is not None
        np.testing.assert_allclose(written[..., ::-1], image, atol=4)
