"""Pictures have the colours of the image, and boxes in their places."""

import sys
import types

import contact_sheet as script
import cv2
import numpy as np
import pytest
import supervision as sv
from pictures import BLUE, GREEN, RED, dataset, plain

from hpr_jax.data.images import read_image
from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.drawing import contact_sheet, draw, write_image

COLOURS = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
# Boxes, labels and captions of no detection.
NOTHING: tuple[np.ndarray, np.ndarray, list[str]] = (np.zeros((0, 4)), np.zeros(0, int), [])


class TestWriting:
    def test_a_png_is_read_back_equal(self, tmp_path):
        write_image(tmp_path / "new/x.png", COLOURS)
        np.testing.assert_array_equal(read_image(tmp_path / "new/x.png"), COLOURS)
        # Another reader, which gives BGR.
        read = cv2.imread(str(tmp_path / "new/x.png"))
        assert read is not None
        np.testing.assert_array_equal(read[..., ::-1], COLOURS)

    @pytest.mark.parametrize("colour", [RED, GREEN, BLUE])
    def test_a_jpeg_has_its_colour(self, tmp_path, colour):
        write_image(tmp_path / "x.jpg", plain(32, 32, colour))
        np.testing.assert_allclose(read_image(tmp_path / "x.jpg"), plain(32, 32, colour), atol=4)

    def test_a_path_that_cannot_be_written(self, tmp_path):
        (tmp_path / "x.png").mkdir()
        with pytest.raises(OSError, match=r"Is a directory: .*x\.png"):
            write_image(tmp_path / "x.png", COLOURS)

    @pytest.mark.parametrize(("name", "side"), [("x.unknown", 4), ("x", 4), ("x.jpg", 70_000)])
    def test_formats_and_sizes_that_are_not_written(self, tmp_path, name, side):
        suffix = name[1:] or "a file without a suffix"
        with pytest.raises(UserError, match=rf"A picture of 1x{side} pixels cannot be written as {suffix}\."):
            write_image(tmp_path / name, np.zeros((side, 1, 3), np.uint8))
        assert not list(tmp_path.iterdir())


class TestDrawing:
    def test_without_boxes_the_picture_is_a_copy(self):
        picture = draw(COLOURS, *NOTHING)
        np.testing.assert_array_equal(picture, COLOURS)
        assert not np.shares_memory(picture, COLOURS)

    def test_boxes_have_the_colours_of_their_labels(self):
        """All four sides have them, in RGB; pixels further away stay as they are."""
        image = plain(200, 300, (10, 60, 110))
        picture = draw(image, np.array([[40, 50, 120, 150], [180, 60, 260, 160]]), np.array([0, 2]), ["a", "b"])
        for (left, top, right, bottom), label in (((40, 50, 120, 150), 0), ((180, 60, 260, 160), 2)):
            colour = sv.ColorPalette.DEFAULT.by_idx(label).as_rgb()
            assert len(set(colour)) == 3
            middle = (left + right) // 2, (top + bottom) // 2
            assert tuple(picture[middle[1], left]) == tuple(picture[middle[1], right]) == colour
            assert tuple(picture[top, right - 5]) == tuple(picture[bottom, middle[0]]) == colour
            assert tuple(picture[middle[1], middle[0]]) == (10, 60, 110)
        assert tuple(picture[100, 150]) == tuple(picture[190, 290]) == (10, 60, 110)
        assert np.all(image == (10, 60, 110))

    def test_captions_stand_at_their_boxes(self):
        """Two drawings that differ in the second caption differ at the second box alone."""
        image, boxes, labels = (
            plain(200, 300, (0, 0, 0)),
            np.array([[40, 50, 120, 150], [180, 60, 260, 160]]),
            np.array([0, 1]),
        )
        one, other = draw(image, boxes, labels, ["cup", "cup"]), draw(image, boxes, labels, ["cup", "hat"])
        rows, columns = np.nonzero((one != other).any(axis=-1))
        assert len(rows)
        assert columns.min() > 170
        assert rows.max() < 70


class TestContactSheets:
    def test_images_are_in_rows_in_their_colours(self):
        """They are scaled to a height of 20, with margins of 4; the shorter row ends in white."""
        sheet = contact_sheet([[plain(40, 40, RED), plain(10, 20, GREEN)], [plain(20, 20, BLUE)]], height=20)
        assert sheet.shape == (56, 76, 3)
        for (top, left), width, colour in (((4, 4), 20, RED), ((4, 32), 40, GREEN), ((32, 4), 20, BLUE)):
            assert np.all(sheet[top : top + 20, left : left + width] == colour)
        covered = np.zeros(sheet.shape[:2], bool)
        covered[4:24, 4:24] = covered[4:24, 32:72] = covered[32:52, 4:24] = True
        assert np.all(sheet[~covered] == 255)

    @pytest.mark.parametrize("counts", [(1, 3), (3, 1)])
    def test_the_widest_row_decides_wherever_it_is(self, counts):
        sheet = contact_sheet([[plain(20, 20, RED)] * count for count in counts], height=20)
        assert sheet.shape == (56, 84, 3)

    def test_a_sheet_can_be_written(self, tmp_path):
        write_image(tmp_path / "sheet.png", np.ascontiguousarray(contact_sheet([[COLOURS]], height=24)))
        np.testing.assert_array_equal(read_image(tmp_path / "sheet.png")[4:28, 4:36], COLOURS)


def test_predictions_are_beside_the_ground_truth(monkeypatch, tmp_path):
    """Red images of 40 x 80 in cells 320 pixels high: everything is eight times as large, and in RGB."""
    pictures = dataset([plain(40, 80, RED)] * 2, [[[10, 5, 20, 15]], [[0, 0, 40, 20]]], labels=[[1], [2]])
    drawn = []

    def find(image, threshold):
        assert threshold == 0.25
        boxes, scores = np.array([[30, 10, 40, 30]], np.float32), np.array([0.751], np.float32)
        return Detections(image, boxes, scores, np.array([0]), ["cup"], [2])

    def draw(image, boxes, labels, captions):
        drawn.append((np.asarray(boxes).tolist(), labels.tolist(), captions, image[0, 0].tolist()))
        return image

    class Detector:
        """Stands for the detector of a run."""

        config, classes = types.SimpleNamespace(data=None), pictures.classes
        __call__ = staticmethod(find)

    monkeypatch.setattr("hpr_jax.load", lambda workdir: Detector(), raising=False)
    monkeypatch.setattr(script, "load_dataset", lambda data, split, classes: pictures)
    monkeypatch.setattr(script, "draw", draw)
    output = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["contact_sheet", str(tmp_path), "--threshold", "0.25", "--output", str(output)])
    script.main()
    predicted = ([[240, 80, 320, 240]], [0], ["cup 0.75"], [255, 0, 0])
    assert drawn == [
        predicted,
        ([[80, 40, 160, 120]], [1], ["pen"], [255, 0, 0]),
        predicted,
        ([[0, 0, 320, 160]], [2], ["hat"], [255, 0, 0]),
    ]
    sheet = read_image(output)
    # Four pictures of 640 x 320 in one row.
    assert sheet.shape == (328, 4 * 648, 3)
    assert sheet[100, 1000].tolist() == [255, 0, 0]
