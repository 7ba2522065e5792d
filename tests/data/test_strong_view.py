"""Strong views: values of each operation, boxes, erased patches, and the distribution of what is drawn."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from hpr_jax.data.augmentation.colour import OPERATIONS
from hpr_jax.data.augmentation.drawn_masks import draw_box
from hpr_jax.data.augmentation.objects import Objects
from hpr_jax.data.augmentation.strong_view import FILL, GEOMETRIC, StrongView, draw_strong_view, strong_image, strong_objects

PLAIN = StrongView((100, 100), "identity", 1.0, "translate_x", 0.0, True, ())


def view(geometric="translate_x", magnitude=0.0, size=(100, 100), patches=(), **others):
    return dataclasses.replace(PLAIN, geometric=geometric, magnitude=magnitude, size=size, patches=patches, **others)


def objects(*boxes: list[float]):
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return Objects(corners, np.arange(len(corners), dtype=np.int32))


def moved(box, changed, drop_vanished=False):
    return strong_objects(objects(box), changed, drop_vanished=drop_vanished).boxes.tolist()


def pixels(*values, repeat=1):
    """An image of one row with these grey levels or colours, each `repeat` times."""
    colours = [value if isinstance(value, tuple) else (value,) * 3 for value in values for _ in range(repeat)]
    return np.array([colours], np.uint8)


class TestColour:
    @pytest.mark.parametrize(
        ("name", "strength", "before", "after"),
        [
            ("identity", 0.3, [7, 200], [7, 200]),
            ("brightness", 0.7, [0, 10, 200], [0, 7, 140]),
            ("brightness", 1.9, [101, 200], [191, 255]),
            # The mean grey is 150.
            ("contrast", 0.5, [100, 200], [125, 175]),
            ("contrast", 1.5, [100, 200], [75, 225]),
            ("contrast", 1.9, [0, 255], [0, 255]),
            # The mean of 100 2/3 counts as 101.
            ("contrast", 0.5, [100, 101, 101], [100, 101, 101]),
            # 0.299 x 200 + 0.587 x 100 + 0.114 x 50 is a grey of 124.
            ("color", 0.5, [(200, 100, 50)], [(162, 112, 87)]),
            ("color", 1.5, [(200, 100, 50)], [(238, 88, 13)]),
            ("posterize", 2.0, [63, 64, 200, 255], [0, 64, 192, 192]),
            ("posterize", 1.2, [63, 64, 200, 255], [0, 64, 192, 192]),
            ("posterize", 0.4, [127, 128], [0, 128]),
            ("posterize", 0.0, [127, 255], [0, 0]),
            ("solarize", 128.0, [127, 128, 200], [127, 127, 55]),
            ("solarize", 0.0, [0, 255], [255, 0]),
            ("solarize", 256.0, [0, 255], [0, 255]),
            # Each channel by itself; red has one level alone.
            ("auto_contrast", 1.0, [(9, 50, 0), (9, 101, 5), (9, 152, 10)], [(9, 0, 0), (9, 127, 127), (9, 255, 255)]),
            ("auto_contrast", 1.0, [40, 40], [40, 40]),
            ("equalize", 1.0, [10, 90], [10, 90]),
        ],
    )
    def test_levels(self, name, strength, before, after):
        image = pixels(*before)
        np.testing.assert_array_equal(OPERATIONS[name][0](image, strength), pixels(*after))

    def test_equalize_spreads_the_levels(self):
        image = np.concatenate([pixels(10, repeat=400), pixels(20, 30, repeat=300)], axis=1)
        # A step of (1000 - 300) // 255 = 2 pixels a level; below the levels lie 0, 400 and 700 pixels.
        changed = OPERATIONS["equalize"][0](image, 1.0)[0, [0, 400, 700], 0]
        assert changed.tolist() == [0, (400 + 1) // 2, 255]

    def test_sharpness_blends_with_a_smoothed_image(self):
        image = np.zeros((5, 5, 3), np.uint8)
        image[2, 2] = 130
        # The smoothed image has 5/13 of the level in the middle and 1/13 around it.
        for strength, middle, beside in ((1.5, 130 * 1.5 - 25, 0), (0.5, 65 + 25, 5), (1.0, 130, 0), (0.1, 13 + 45, 9)):
            sharp = OPERATIONS["sharpness"][0](image, strength)
            assert sharp[2, 2].tolist() == [middle] * 3
            assert sharp[1, 1].tolist() == [beside] * 3
            assert not sharp[0, 0].any()

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_the_original_stays_as_it_is(self, name):
        image = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
        before = image.copy()
        changed = OPERATIONS[name][0](image, 0.5)
        assert (changed.shape, changed.dtype) == (image.shape, np.uint8)
        changed[...] = 0
        np.testing.assert_array_equal(image, before)


class TestGeometry:
    @pytest.mark.parametrize(
        ("geometric", "magnitude", "box", "expected"),
        [
            # A quarter turn to the right about (49.5, 49.5): (x, y) -> (99 - y, x).
            ("rotate", 90.0, [10, 20, 30, 25], [74, 10, 79, 30]),
            ("rotate", -90.0, [10, 20, 30, 25], [20, 69, 25, 89]),
            # Half a side of 20 becomes 20 (cos 30 + sin 30).
            ("rotate", 30.0, [29.5, 29.5, 69.5, 69.5], [22.1795, 22.1795, 76.8205, 76.8205]),
            ("shear_x", 45.0, [10, 20, 30, 40], [30, 20, 70, 40]),
            ("shear_x", -45.0, [60, 20, 90, 40], [20, 20, 70, 40]),
            ("shear_y", 45.0, [10, 20, 30, 40], [10, 30, 30, 70]),
            ("shear_y", -45.0, [10, 20, 30, 40], [10, 0, 30, 30]),
            ("translate_x", 0.1, [10, 20, 30, 40], [20, 20, 40, 40]),
            ("translate_x", -0.1, [5, 20, 30, 40], [0, 20, 20, 40]),
            ("translate_y", 0.1, [10, 20, 30, 95], [10, 30, 30, 100]),
        ],
    )
    def test_known_places(self, geometric, magnitude, box, expected):
        np.testing.assert_allclose(moved(box, view(geometric, magnitude)), [expected], atol=1e-3)

    def test_translations_are_whole_pixels(self):
        assert moved([10, 10, 20, 20], view("translate_x", 0.1, size=(100, 57))) == [[15, 10, 25, 20]]
        assert moved([10, 10, 20, 20], view("translate_x", -0.1, size=(100, 57))) == [[5, 10, 15, 20]]
        assert moved([10, 10, 20, 20], view("translate_y", 0.1, size=(77, 100))) == [[10, 17, 20, 27]]

    @pytest.mark.parametrize(
        ("geometric", "magnitude", "place", "bare"),
        [
            ("rotate", 90.0, (10, 79), None),
            ("shear_x", 45.0, (20, 30), (99, 0)),
            ("shear_y", -45.0, (10, 10), (99, 99)),
            ("translate_x", 0.1, (20, 20), (50, 9)),
            ("translate_x", -0.1, (20, 0), (50, 90)),
            ("translate_y", 0.1, (30, 10), (9, 50)),
            ("translate_y", -0.1, (10, 10), (90, 50)),
        ],
    )
    def test_pixels_move_with_boxes(self, geometric, magnitude, place, bare):
        image = np.full((100, 100, 3), 10, np.uint8)
        image[20, 10] = 255
        result = strong_image(image, view(geometric, magnitude))
        assert np.argwhere(result[..., 0] > 200).tolist() == [list(place)]
        assert bare is None or result[bare].tolist() == [FILL] * 3
        assert (result == FILL).any() == (bare is not None)

    def test_an_even_turn_keeps_the_object_in_its_box(self):
        image = np.zeros((80, 120, 3), np.uint8)
        image[30:50, 40:70] = 255
        for geometric in GEOMETRIC:
            changed = view(geometric, -17.3 if GEOMETRIC[geometric] > 1 else -0.1, size=(80, 120))
            ((left, top, right, bottom),) = moved([40, 30, 70, 50], changed)
            rows, columns = np.nonzero(strong_image(image, changed)[..., 0] > FILL)
            # Boxes turn about centres of pixels, as published: up to a third of a pixel beside the edges.
            assert abs(left - columns.min()) < 1.4
            assert abs(right - columns.max() - 1) < 1.4
            assert abs(top - rows.min()) < 1.4
            assert abs(bottom - rows.max() - 1) < 1.4

    def test_masks_move_with_boxes(self):
        square = draw_box(np.array([10, 20, 30, 40]), (100, 100))
        seen = dataclasses.replace(objects([10, 20, 30, 40]), masks=(square,))
        changed = view("shear_x", 45.0, patches=((30, 20, 50, 30),))
        (mask,) = strong_objects(seen, changed, drop_vanished=False).masks
        # Row y starts at 10 + y; the upper ten rows are erased up to column 50, the first one wholly.
        assert mask.box.tolist() == [40, 21, 69, 40]
        assert mask.area == 20 * 20 - sum(50 - (10 + y) for y in range(20, 30))

    def test_what_is_moved_out_of_sight(self):
        changed = view("shear_x", 45.0)
        assert moved([60, 70, 80, 90], changed) == [[100, 70, 100, 90]]
        assert moved([60, 70, 80, 90], changed, drop_vanished=True) == []
        assert moved([60, 10, 80, 90], changed, drop_vanished=True) == [[70, 10, 100, 90]]
        assert strong_objects(objects(), changed, drop_vanished=True).boxes.shape == (0, 4)


class TestOrderAndErasing:
    def test_the_order_of_colour_and_geometry(self):
        image = np.full((100, 100, 3), 100, np.uint8)
        darker = dataclasses.replace(view("translate_x", 0.1), colour="brightness", strength=0.5)
        result = strong_image(image, darker)
        assert (result[0, 0, 0], result[0, 50, 0]) == (FILL, 50)
        result = strong_image(image, dataclasses.replace(darker, colour_first=False))
        assert (result[0, 0, 0], result[0, 50, 0]) == (FILL // 2, 50)

    def test_patches_are_filled(self):
        image = np.zeros((100, 100, 3), np.uint8)
        result = strong_image(image, view(patches=((10, 20, 13, 25), (50, 50, 50, 50))))
        assert np.all(result[20:25, 10:13] == FILL)
        assert result.astype(int).sum() == 15 * 3 * FILL
        assert not image.any()

    @pytest.mark.parametrize(
        ("patches", "stays"),
        [
            ([(0, 0, 100, 17)], True),
            ([(0, 0, 100, 18)], False),
            ([(10, 0, 29, 20)], False),
            # Two patches over the same half cover everything, since what both cover counts twice.
            ([(10, 0, 20, 20)], True),
            ([(10, 0, 20, 20), (10, 0, 20, 20)], False),
        ],
    )
    def test_objects_below_patches_are_dropped(self, patches, stays):
        seen = objects([10, 0, 30, 20], [60, 60, 90, 90])
        left = strong_objects(seen, view(patches=tuple(patches)), drop_vanished=False)
        assert left.labels.tolist() == ([0, 1] if stays else [1])


def test_what_is_drawn():
    rng, size, count = np.random.default_rng(0), (200, 300), 4000
    drawn = [draw_strong_view(size, rng) for _ in range(count)]
    colours, geometric = Counter(v.colour for v in drawn), Counter(v.geometric for v in drawn)
    assert colours.keys() == OPERATIONS.keys()
    assert geometric.keys() == GEOMETRIC.keys()
    for counter in (colours, geometric, Counter(v.colour_first for v in drawn), Counter(len(v.patches) for v in drawn)):
        expected = count / len(counter)
        assert max(abs(number - expected) for number in counter.values()) < 5 * expected**0.5
    for name, (low, high) in {"posterize": (0, 4), "solarize": (0, 256), "color": (0.1, 1.9)}.items():
        strengths = np.array([v.strength for v in drawn if v.colour == name])
        assert np.all((low <= strengths) & (strengths <= high))
        assert strengths.min() < low + (high - low) / 20
        assert strengths.max() > high - (high - low) / 20
        np.testing.assert_allclose(strengths * 10, np.rint(strengths * 10), atol=1e-6)
    for name, limit in GEOMETRIC.items():
        magnitudes = np.array([v.magnitude for v in drawn if v.geometric == name])
        assert abs(np.mean(magnitudes > 0) - np.mean(magnitudes < 0)) < 0.15
        if limit < 1:
            # Rounded to one decimal, a translation is nothing or a tenth.
            assert set(np.abs(magnitudes)) == {0.0, 0.1}
            assert 0.4 < np.mean(magnitudes == 0) < 0.6
        else:
            assert 29 < np.abs(magnitudes).max() <= limit
            np.testing.assert_allclose(magnitudes * 10, np.rint(magnitudes * 10), atol=1e-6)
    left, top, right, bottom = np.array([patch for v in drawn for patch in v.patches]).T
    assert np.all((left >= 0) & (top >= 0) & (right <= 300) & (bottom <= 200))
    # The same part of both sides.
    assert np.all(np.abs((right - left) / 300 - (bottom - top) / 200) < 1 / 200)
    assert 57 <= (right - left).max() <= 60
    assert (bottom - top).min() <= 1
    assert Counter(len(v.patches) for v in drawn).keys() == {1, 2, 3, 4, 5}
