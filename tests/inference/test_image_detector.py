"""The image detector, with known detections: from an image of any form to boxes in its pixels."""

import io
import json
from typing import Any

import numpy as np
import pytest
import tiny
from flax import nnx
from pictures import BLUE, CLASSES, RED, plain, png
from PIL import Image

import hpr_jax
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.image_detector import ImageDetector


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
        self.batches = [*getattr(self, "batches", []), len(images)]
        return tuple(np.repeat(array, len(images), axis=0) for array in self.arrays)


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
            (b"bytes", "The image of 5 bytes"),
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

        monkeypatch.setattr("hpr_jax.inference.detections.draw", draw)
        image = plain(64, 64, RED)
        result = detector(Detect((0, 0, 9, 9), (8, 8, 32, 16), scores=[0.751, 0.5], labels=[1, 2]))(image, 0.0)
        assert result.draw() == "picture"
        ((pixels, boxes, labels, captions),) = drawn
        np.testing.assert_array_equal(pixels, image)
        assert boxes.tolist() == [[0, 0, 9, 9], [8, 8, 32, 16]]
        assert labels.tolist() == [1, 2]
        assert captions == ["pen 0.75", "hat 0.50"]


class TestLists:
    """Batches are of four images, which are padded to the same shape."""

    def made(self, detect):
        made = detector(detect)
        made.config.evaluate.batch_size = 4
        return made

    def test_images_of_a_shape_share_batches(self):
        detect = Detect((0, 0, 9, 9))
        found = self.made(detect)([plain(64, 64, RED)] * 9, 0.0)
        # The last one is alone, and runs in the program for a single image.
        assert detect.batches == [4, 4, 1]
        assert [len(one) for one in found] == [1] * 9

    def test_a_batch_that_is_not_full_is_filled_up(self):
        detect = Detect((0, 0, 9, 9))
        assert len(self.made(detect)([plain(64, 64, RED)] * 6)) == 6
        assert detect.batches == [4, 4]

    def test_results_come_in_the_order_of_the_images(self):
        """Those of another shape run apart."""
        detect = Detect((0, 0, 64, 64))
        images = [plain(64, 64, RED), plain(600, 30, BLUE), plain(32, 32, RED), plain(300, 15, BLUE)]
        made = detector(detect, side=64, max_side=640)
        made.config.evaluate.batch_size = 4
        found = made(images, 0.0)
        assert all(one.image is image for one, image in zip(found, images))
        assert detect.batches == [4, 4]

    def test_an_empty_list(self):
        assert self.made(Detect((0, 0, 9, 9)))([]) == []


class TestWhatDetectionsTell:
    FOUND = Detections(
        plain(40, 60, RED),
        np.array([[1, 2, 3, 4]] * 6, np.float32),
        np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], np.float32),
        np.array([0, 1, 2, 0, 1, 2], np.int32),
        ["cup", "pen", "hat"] * 2,
        [2, 5, 9] * 2,
    )

    def test_a_line(self):
        assert repr(self.FOUND) == (
            "<Detections in 60x40 pixels: cup 0.90, pen 0.80, hat 0.70, cup 0.60, pen 0.50 and 1 more>"
        )
        assert repr(self.FOUND.above(1.0)) == "<Detections in 60x40 pixels: none>"

    def test_a_dictionary_of_json(self):
        found = json.loads(json.dumps(self.FOUND.above(0.75).to_dict()))
        assert (found["height"], found["width"]) == (40, 60)
        first, second = found["detections"]
        assert first == {"box": [1, 2, 3, 4], "score": pytest.approx(0.9), "label": 0, "name": "cup", "category_id": 2}
        assert second["name"] == "pen"

    def test_detections_of_supervision(self):
        found = self.FOUND.to_supervision()
        assert found.xyxy.tolist() == self.FOUND.boxes.tolist()
        assert found.class_id.tolist() == [0, 1, 2, 0, 1, 2]
        assert list(found["class_name"]) == self.FOUND.names
        assert len(self.FOUND.above(1.0).to_supervision()) == 0

    def test_a_picture_in_notebooks(self):
        assert Image.open(io.BytesIO(self.FOUND._repr_png_())).size == (60, 40)


def test_bytes_of_a_file_are_an_image():
    made = detector(Detect((0, 0, 9, 9)))
    assert made(png(plain(30, 20, RED))).image.tolist() == plain(30, 20, RED).tolist()
    with pytest.raises(UserError, match=r"The image of 7 bytes .*"):
        made(b"nothing")
