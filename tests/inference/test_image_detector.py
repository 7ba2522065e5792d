"""Image detector and `predict`, with known detections: from an image to boxes in its pixels, and to what is written."""

import json
import os
import types
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from mutations import examples
from pictures import BLUE, CLASSES, GREEN, RED, plain, png
from PIL import Image

import hpr_jax
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.inference.image_detector import Detections, ImageDetector
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


class Detect:
    """Stands for a compiled detector. It returns these boxes, in pixels of the padded input, and remembers its inputs."""

    def __init__(self, *boxes, scores=None, labels=None, valid=None):
        count = len(boxes)
        self.arrays = (
            np.array(boxes, np.float32).reshape(1, -1, 4),
            np.array([scores or np.linspace(0.9, 0.5, count)], np.float32),
            np.array([labels or [number % 3 for number in range(count)]], np.int32),
            np.array([valid or [True] * count]),
        )

    def __call__(self, state, images, sizes):
        self.images, self.sizes = images, sizes
        return self.arrays


def detector(detect, side=64, max_side=64, canvas=0, classes=CLASSES):
    """An image detector whose compiled function is `detect`."""
    config = tiny.config()
    config.evaluate.update(side=side, max_side=max_side, canvas=canvas)
    no_module: Any = nnx.Module()
    made = ImageDetector(no_module, classes, config)
    made._detect = detect
    return made


class TestBoxesInPixelsOfTheImage:
    @pytest.mark.parametrize(
        ("shape", "settings", "box", "expected"),
        [
            # Portrait: 100 x 80 becomes 64 x 51.
            ((100, 80), {}, (0, 0, 51, 64), (0, 0, 80, 100)),
            ((100, 80), {}, (25.5, 16, 51, 32), (40, 25, 80, 50)),
            # Landscape: 51 x 64.
            ((80, 100), {}, (0, 0, 64, 51), (0, 0, 100, 80)),
            ((80, 100), {}, (16, 25.5, 32, 51), (25, 40, 50, 80)),
            # Made larger: 16 x 32 becomes 32 x 64.
            ((16, 32), {}, (8, 4, 64, 32), (4, 2, 32, 16)),
            # The shorter side becomes 40: 40 x 80.
            ((20, 40), {"side": 40, "max_side": 100}, (10, 10, 80, 40), (5, 5, 40, 20)),
            # On a canvas the image is at the top left, and what lies beyond it is clipped.
            ((100, 80), {"canvas": 96}, (0, 0, 51, 64), (0, 0, 80, 100)),
            ((100, 80), {"canvas": 96}, (25.5, 32, 96, 96), (40, 50, 80, 100)),
            ((80, 100), {"canvas": 96}, (32, 25.5, 96, 96), (50, 40, 100, 80)),
        ],
    )
    def test_known_places(self, shape, settings, box, expected):
        height, width = shape
        result = detector(Detect(box), **settings)(plain(height, width, RED), 0.0)
        assert result.boxes.dtype == np.float32
        np.testing.assert_allclose(result.boxes, [expected], rtol=1e-5, atol=1e-4)

    def test_of_a_turned_photograph(self, tmp_path):
        """Stored as 80 x 100, to be seen as 100 x 80: boxes are in pixels of the photograph as it is seen."""
        tiny.write_turned(tmp_path / "turned.jpg", plain(80, 100, RED), 6)
        result = detector(Detect((0, 0, 51, 64), (25.5, 0, 51, 32)))(tmp_path / "turned.jpg", 0.0)
        assert result.image.shape == (100, 80, 3)
        np.testing.assert_allclose(result.boxes, [(0, 0, 80, 100), (40, 0, 80, 50)], atol=1e-4)

    def test_each_of_several_images_has_its_own_scale(self):
        results = detector(Detect((0, 0, 32, 32)))([plain(64, 64, RED), plain(128, 128, RED)], 0.0)
        assert [result.boxes.tolist() for result in results] == [[[0, 0, 32, 32]], [[0, 0, 64, 64]]]


class TestInput:
    @pytest.mark.parametrize("canvas", [0, 96])
    def test_is_rgb_at_the_top_left_of_a_multiple_of_128(self, tmp_path, canvas):
        """An image whose left half is red and whose right half is blue: as an array, a path, and the text of a path."""
        image = np.concatenate([plain(100, 40, RED), plain(100, 40, BLUE)], axis=1)
        (tmp_path / "x.png").write_bytes(png(image))
        for source in (image, tmp_path / "x.png", str(tmp_path / "x.png")):
            detect = Detect((0, 0, 9, 9))
            result = detector(detect, canvas=canvas)(source, 0.0)
            np.testing.assert_array_equal(result.image, image)
            assert detect.images.shape == (1, 128, 128, 3)
            assert detect.images.dtype == np.uint8
            assert detect.sizes.tolist() == [[canvas or 64, canvas or 51]]
            assert detect.images[0, 63, 0].tolist() == list(RED)
            assert detect.images[0, 63, 50].tolist() == list(BLUE)
            assert np.all(detect.images[0, 64:canvas, :canvas] == 114)
            assert not detect.images[0, canvas or 64 :].any()
            assert not detect.images[0, :, canvas or 51 :].any()


class TestForms:
    """An image is the same in every form: what the network sees is what it sees of the file."""

    def seen(self, image, bits=16):
        detect = Detect((0, 0, 8, 8))
        made = detector(detect, 64, 64)
        made.config.data.image_bits = bits
        made(image)
        return detect.images[0, : detect.sizes[0][0], : detect.sizes[0][1]]

    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
    def test_pillow_images_are_read_as_their_files(self, tmp_path, mode):
        rng = np.random.default_rng(0)
        image = Image.fromarray(rng.integers(0, 255, (48, 64, 3)).astype(np.uint8))
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 2**16, (48, 64)).astype(np.uint16))
        elif mode == "RGBA":
            image.putalpha(Image.fromarray(rng.integers(0, 255, (48, 64)).astype(np.uint8)))
        else:
            image = image.convert(mode)
        assert image.mode == mode
        path = tmp_path / ("x.png" if mode != "CMYK" else "x.tiff")
        image.save(path)
        seen = self.seen(image)
        assert np.ptp(seen) > 100
        np.testing.assert_allclose(seen.astype(int), self.seen(path), atol=1)

    def test_pillow_images_are_turned(self, tmp_path):
        tiny.write_turned(tmp_path / "x.jpg", np.vstack([plain(24, 64, RED), plain(24, 64, BLUE)]), 6)
        seen = self.seen(Image.open(tmp_path / "x.jpg"))
        assert seen.shape == (64, 48, 3)
        np.testing.assert_allclose(seen.astype(int), self.seen(tmp_path / "x.jpg"), atol=2)

    @pytest.mark.parametrize("byte_order", ["<", ">"])
    @pytest.mark.parametrize("bits", [12, 16])
    def test_16_bits(self, tmp_path, byte_order, bits):
        """A file, a Pillow image and arrays become what the upper 8 of so many bits are."""
        samples = np.random.default_rng(0).integers(0, 2**bits, (48, 64)).astype(f"{byte_order}u2")
        Image.fromarray(samples.astype(np.uint16)).save(tmp_path / "x.png")
        expected = self.seen(np.array(samples >> (bits - 8), np.uint8))
        colours = np.repeat(samples[..., None], 3, axis=2)
        for image in (samples, colours, tmp_path / "x.png", Image.open(tmp_path / "x.png")):
            np.testing.assert_array_equal(self.seen(image, bits), expected)

    def test_grey_arrays(self):
        grey = np.random.default_rng(0).integers(0, 255, (48, 64)).astype(np.uint8)
        np.testing.assert_array_equal(self.seen(grey), self.seen(np.stack([grey] * 3, axis=-1)))

    @pytest.mark.parametrize(
        ("image", "sentence"),
        [
            (np.zeros((8, 8, 3)), r"an array of float64 \[8, 8, 3\]"),
            (np.zeros((8, 8, 4), np.uint8), r"an array of uint8 \[8, 8, 4\]"),
            (np.zeros((0, 8, 3), np.uint8), "this one is of type ndarray"),
            (None, "an array of object"),
            (5, r"an array of int64 \[\]"),
            (b"bytes", "this one is an array of"),
            (Image.new("F", (8, 8)), "mode 'F' has no range of values; convert it to 'L' or 'RGB'"),
            (Image.new("RGB", (0, 8)), "has no pixels"),
        ],
    )
    def test_what_is_no_image_gets_a_sentence(self, image, sentence):
        with pytest.raises(hpr_jax.UserError, match=sentence):
            detector(Detect((0, 0, 8, 8)))(image)

    def test_a_pillow_image_that_is_cut_short(self, tmp_path):
        (tmp_path / "x.png").write_bytes(png(np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8))[:500])
        with pytest.raises(hpr_jax.UserError, match="The Pillow image cannot be decoded"):
            detector(Detect((0, 0, 8, 8)))(Image.open(tmp_path / "x.png"))


class TestSelection:
    def test_the_threshold_is_the_lowest_score(self):
        made = detector(Detect(*[(0, 0, 9, 9)] * 4, scores=[0.75, 0.5, 0.25, 0.125]))
        image = plain(64, 64, RED)
        for threshold, count in ((0.0, 4), (0.125, 4), (0.25, 3), (0.5, 2), (0.51, 1), (0.75, 1), (0.76, 0)):
            assert len(made(image, threshold)) == len(made(image, 0.0).above(threshold)) == count, threshold
        assert made(image).scores.tolist() == [0.75, 0.5]

    def test_the_threshold_holds_for_lists(self):
        made = detector(Detect(*[(0, 0, 9, 9)] * 4, scores=[0.75, 0.5, 0.25, 0.125]))
        image = plain(64, 64, RED)
        for threshold, count in ((0.0, 4), (0.25, 3), (0.6, 1)):
            assert [len(found) for found in made([image, image], threshold)] == [count, count]
            assert [len(found) for found in made((image,), threshold)] == [count]

    def test_fields_of_a_detection_stay_together(self):
        boxes = [(0, 0, 9, 9), (1, 1, 8, 8), (2, 2, 7, 7), (3, 3, 6, 6)]
        detect = Detect(*boxes, scores=[0.75, 0.5, 0.25, 0.125], labels=[2, 0, 1, 2], valid=[True, False, True, True])
        result = detector(detect)(plain(64, 64, RED), 0.25)
        assert result.boxes.tolist() == [[0, 0, 9, 9], [2, 2, 7, 7]]
        assert result.scores.tolist() == [0.75, 0.25]
        assert result.labels.tolist() == [2, 1]
        assert result.names == ["hat", "pen"]
        assert result.category_ids == [9, 5]

    def test_what_is_above_a_threshold_may_lie_anywhere(self):
        boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
        some = Detections(plain(9, 9, RED), boxes, np.array([0.1, 0.9, 0.4]), np.arange(3), ["cup", "pen", "hat"], [2, 5, 9])
        found = some.above(0.4)
        assert found.boxes.tolist() == boxes[1:].tolist()
        assert (found.scores.tolist(), found.labels.tolist()) == ([0.9, 0.4], [1, 2])
        assert (found.names, found.category_ids) == (["pen", "hat"], [5, 9])

    def test_names_and_ids_follow_the_order_of_classes(self):
        classes = Classes(("hat", "cup", "pen"), (9, 2, 5))
        result = detector(Detect(*[(0, 0, 9, 9)] * 3, labels=[0, 1, 2]), classes=classes)(plain(64, 64, RED), 0.0)
        assert (result.names, result.category_ids) == (["hat", "cup", "pen"], [9, 2, 5])

    def test_pictures_show_all_detections(self, monkeypatch):
        drawn = []

        def draw(*arguments):
            drawn.append(arguments)
            return "picture"

        monkeypatch.setattr("hpr_jax.inference.image_detector.draw", draw)
        image = plain(64, 64, RED)
        result = detector(Detect((0, 0, 9, 9), (8, 8, 32, 16), scores=[0.751, 0.5], labels=[1, 2]))(image, 0.0)
        assert result.draw() == "picture"
        ((pixels, boxes, labels, captions),) = drawn
        np.testing.assert_array_equal(pixels, image)
        assert boxes.tolist() == [[0, 0, 9, 9], [8, 8, 32, 16]]
        assert labels.tolist() == [1, 2]
        assert captions == ["pen 0.75", "hat 0.50"]


def with_config(find) -> Any:
    """A function that stands for a detector, which has a config."""
    find.config = tiny.config()
    return find


class TestPredict:
    @pytest.fixture
    def loaded(self, monkeypatch):
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

    def test_boxes_scores_and_classes_are_written(self, loaded, tmp_path):
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

    def test_no_image_is_written_over(self, loaded, tmp_path):
        """The pictures come into the folder of the images."""
        cv2.imwrite(str(tmp_path / "x.jpg"), plain(40, 40, RED))
        (tmp_path / "x.png").write_bytes(png(plain(40, 40, GREEN)))
        before = {name: (tmp_path / name).read_bytes() for name in ("x.jpg", "x.png")}
        predict(tmp_path, [tmp_path], tmp_path, 0.5)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        pictures = [entry["picture"] for entry in json.loads((tmp_path / "predictions.json").read_text())["images"]]
        assert pictures == [str(tmp_path / "x_2.jpg"), str(tmp_path / "x_3.jpg")]

    def test_pictures_of_an_earlier_call_are_no_images(self, loaded, tmp_path):
        (tmp_path / "x.png").write_bytes(png(plain(40, 40, RED)))
        for _ in range(2):
            predict(tmp_path, [tmp_path], tmp_path, 0.5)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.json", "x.jpg", "x.png"]
        # One that is named is taken all the same.
        predict(tmp_path, [tmp_path / "x.jpg"], tmp_path / "other", 0.5)
        assert (tmp_path / "other/x.jpg").is_file()
        (tmp_path / "x.png").unlink()
        with pytest.raises(UserError, match=r"All images are pictures that predict wrote.*choose another --output"):
            predict(tmp_path, [tmp_path], tmp_path, 0.5)

    def test_files_of_others_are_not_written_over(self, loaded, tmp_path):
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

    def test_what_goes_wrong_with_an_image_stops_no_other(self, monkeypatch, tmp_path, caplog):
        """After each image, predictions.json has all before it; the last one is interrupted."""
        for name in "abcd":
            (tmp_path / f"{name}.png").write_bytes(png(plain(40, 40, RED)))
        result, calls = tmp_path / "out/predictions.json", []

        def find(image, threshold):
            calls.append([entry["file"][-5] for entry in json.loads(result.read_text())["images"]] if calls else [])
            if len(calls) == 2:
                raise ValueError("too large\nfor this machine")
            if len(calls) == 4:
                raise KeyboardInterrupt
            return Detections(image, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int), [], [])

        monkeypatch.setattr("hpr_jax.inference.predict.load", lambda *_, **__: with_config(find))
        monkeypatch.setattr("hpr_jax.inference.predict.INTERVAL", -1.0)
        with pytest.raises(KeyboardInterrupt):
            predict(tmp_path, [tmp_path], tmp_path / "out", 0.5)
        assert calls == [[], ["a"], ["a"], ["a", "c"]]
        content = json.loads(result.read_text())
        assert [entry["file"][-5] for entry in content["images"]] == ["a", "c"]
        assert content["skipped"] == [str(tmp_path / "b.png")]
        assert f"{tmp_path / 'b.png'}: too large; skipped" in caplog.messages

    @examples(40, 2000)
    @given(
        names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
        beside=st.booleans(),
        again=st.booleans(),
    )
    def test_any_names(self, loaded, tmp_path_factory, names, beside, again):
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

    def test_images_of_one_name_keep_pictures_of_their_own(self, loaded, tmp_path):
        """At the second call, too, which may write over the pictures of the first."""
        for name, colour in (("a", RED), ("b", BLUE)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.png").write_bytes(png(plain(40, 40, colour)))
        for _ in range(2):
            predict(tmp_path, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", 0.5)
            content = json.loads((tmp_path / "out/predictions.json").read_text())
            assert [Path(entry["picture"]).name for entry in content["images"]] == ["x.jpg", "x_2.jpg"]
            assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.json", "x.jpg", "x_2.jpg"]

    def test_names_that_are_no_text(self, loaded, tmp_path):
        name = os.fsdecode(b"caf\xe9 \xc3\xbc.png")
        (tmp_path / name).write_bytes(png(plain(40, 40, RED)))
        predict(tmp_path, [tmp_path], tmp_path / "out", 0.5)
        assert (tmp_path / "out" / name.replace(".png", ".jpg")).is_file()
        (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
        assert entry["file"] == str(tmp_path / name)

    def test_the_network_and_the_reader_see_rgb(self, loaded, monkeypatch, tmp_path):
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
