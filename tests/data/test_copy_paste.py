"""Annotated and drawn masks, large-scale jitter, and copy-paste."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from hpr_jax.data.augmentation.copy_paste import choose_donated, masked_objects, paste
from hpr_jax.data.augmentation.crop_resize_flip import GREY, Geometry, apply_to_boxes, apply_to_image, draw_large_scale
from hpr_jax.data.augmentation.drawn_masks import EMPTY_MASK, DrawnMask, draw_box, draw_mask
from hpr_jax.data.augmentation.objects import Objects
from hpr_jax.data.dataset import ImageAnnotations
from hpr_jax.data.masks import MalformedMaskError, mask_box, parse_segmentation

LSJ: dict[str, Any] = {"flip": 0.5, "lsj": {"side": 64, "scale_range": (0.1, 2.0)}}
AS_IT_IS = np.eye(2, 3)
SIZE = (50, 60)


def rectangle(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def canvas_of(mask, size=SIZE):
    canvas = np.zeros(size, np.uint8)
    canvas[mask.window] = mask.bitmap
    return canvas


def disc(size=SIZE):
    y, x = np.mgrid[: size[0], : size[1]]
    return np.asfortranarray(((x - 20) ** 2 + (y - 25) ** 2 < 150) | (x > 55), np.uint8)


def run_lengths(bitmap):
    """COCO's run lengths, not compressed: column by column, beginning with zeros."""
    values = bitmap.ravel(order="F")
    changes = np.flatnonzero(np.diff(values)) + 1
    counts = np.diff([0, *changes, len(values)]).tolist()
    return {"size": list(bitmap.shape), "counts": [0, *counts] if values[0] else counts}


class TestMasks:
    def test_polygons(self):
        mask = parse_segmentation([rectangle(10, 20, 30, 40), rectangle(35, 20, 40, 25)], *SIZE)
        assert mask_box(mask) == (10, 20, 30, 20)
        drawn = draw_mask(mask, AS_IT_IS, SIZE)
        expected = np.zeros(SIZE, np.uint8)
        expected[20:40, 10:30] = expected[20:25, 35:40] = 1
        np.testing.assert_array_equal(canvas_of(drawn), expected)
        assert drawn.box.tolist() == [10, 20, 40, 40]
        assert drawn.area == 425

    def test_run_lengths(self):
        bitmap = disc()
        compressed = coco_mask.encode(bitmap)
        compressed["counts"] = compressed["counts"].decode()
        for segmentation in (run_lengths(bitmap), compressed):
            drawn = draw_mask(parse_segmentation(segmentation, *SIZE), AS_IT_IS, SIZE)
            np.testing.assert_array_equal(canvas_of(drawn), bitmap)

    def test_compressed_runs_of_any_length(self):
        bitmap = np.zeros((700, 900), np.uint8)
        bitmap[:, 300:600] = 1
        bitmap[::7, 700] = 1
        compressed = coco_mask.encode(np.asfortranarray(bitmap))
        segmentation = {"size": [700, 900], "counts": compressed["counts"].decode()}
        mask = parse_segmentation(segmentation, 700, 900)
        assert isinstance(mask, Mapping)
        assert mask["counts"] == compressed["counts"]

    @pytest.mark.parametrize("make", [lambda: [rectangle(10, 20, 30, 40)], lambda: run_lengths(box_on_a_canvas())])
    def test_geometry(self, make):
        mask = parse_segmentation(make(), *SIZE)
        geometry = Geometry(window=(5, 10, 45, 50), size=(80, 120), flip=True, content=(80, 80))
        # Twice as large from (5, 10) on, then mirrored in a width of 80.
        assert draw_mask(mask, geometry.matrix, geometry.resized).box.tolist() == [30, 20, 70, 60]
        # Cut off on the left, and out of sight.
        assert draw_mask(mask, Geometry((20, 0, 60, 50), (50, 40)).matrix, (50, 40)).box.tolist() == [0, 20, 10, 40]
        assert draw_mask(mask, Geometry((40, 0, 60, 50), (50, 20)).matrix, (50, 20)).area == 0

    @pytest.mark.parametrize(
        ("segmentation", "reason"),
        [
            ([[1, 2, 3, 4]], "no polygon of at least three corners"),
            ([[1, 2, 3, 4, 5, 6, 7]], "no polygon of at least three corners"),
            ([[1, 2, 3, 4, 5, float("nan")]], "no polygon of at least three corners"),
            ([1, 2, 3, 4], "no polygon of at least three corners"),
            ([[1, 2, 3, 4, 5, 6], 7], "not a list of polygons"),
            ([[1, 2, 3, 4, 5, 10**400]], "not a list of numbers"),
            ([["a", 2, 3, 4, 5, 6]], "not a list of numbers"),
            ([[[1, 2], [3, 4], [5, 6]]], "no polygon of at least three corners"),
            ("mask.png", "neither a list of polygons nor run lengths"),
            ({"counts": [3000]}, "size None"),
            ({"size": [60, 50], "counts": [3000]}, r"size \[60, 50\], and its image is \[50, 60\]"),
            ({"size": [50, 60], "counts": [2999]}, "do not add up"),
            ({"size": [50, 60], "counts": [3001]}, "do not add up"),
            ({"size": [50, 60], "counts": [3001, -1]}, "do not add up"),
            ({"size": [50, 60], "counts": []}, "do not add up"),
            ({"size": [50, 60], "counts": ""}, "do not add up"),
            ({"size": [50, 60], "counts": "05"}, "do not add up"),
            ({"size": [50, 60], "counts": "é"}, "no run lengths"),
            ({"size": [50, 60], "counts": "P"}, "no run lengths"),
            ({"size": [50, 60], "counts": None}, "no run lengths"),
            ({"size": [50, 60]}, "no run lengths"),
            ({"size": [50, 60], "counts": [float("inf")]}, "no run lengths"),
            ({"size": [50, 60], "counts": [1000.5, 1999.5]}, "no run lengths"),
            ([[0, 0, 1e8, 0, 1e8, 1e8, 0, 1e8]], "far outside"),
        ],
    )
    def test_malformed(self, segmentation, reason):
        with pytest.raises(MalformedMaskError, match=reason):
            parse_segmentation(segmentation, *SIZE)

    def test_malformed_parts_are_left_out(self):
        mask = parse_segmentation([[1, 2, 3, 4], rectangle(10, 20, 30, 40)], *SIZE)
        assert not isinstance(mask, Mapping)
        assert [polygon.shape for polygon in mask] == [(4, 2)]

    def test_drawn_masks(self):
        drawn = DrawnMask(10, 20, np.ones((6, 8), np.uint8))
        assert drawn.without([(0, 0, 12, 60), (100, 0, 200, 9)]).box.tolist() == [12, 20, 18, 26]
        assert drawn.without([(11, 21, 17, 25)]).area == 48 - 24
        assert drawn.without([(0, 0, 60, 60)]).box.tolist() == [0, 0, 0, 0]
        # These begin above and beside the mask.
        assert drawn.without([(7, 17, 13, 23)]).area == 48 - 9
        assert drawn.without([(0, 17, 60, 19), (7, 0, 9, 60)]).area == 48
        cover = np.zeros(SIZE, np.uint8)
        cover[20:23] = 1
        assert drawn.behind(cover).box.tolist() == [10, 23, 18, 26]
        assert drawn.area == 48
        moved = drawn.warp(np.array([[1.0, 0, 45], [0, 1, -22]]), SIZE)
        assert moved.box.tolist() == [55, 0, 60, 4]
        assert drawn.warp(np.array([[1.0, 0, 50], [0, 1, 0]]), SIZE).area == 0
        assert EMPTY_MASK.warp(AS_IT_IS, SIZE).area == 0
        assert draw_box(np.array([-3, 2.4, 5.6, 70]), SIZE).box.tolist() == [0, 2, 6, 50]


def box_on_a_canvas():
    return canvas_of(draw_box(np.array([10, 20, 30, 40]), SIZE))


class TestLargeScale:
    def test_what_is_drawn(self):
        sizes = np.tile([[48, 60], [90, 60]], (1000, 1))
        drawn = draw_large_scale(sizes, LSJ, np.random.default_rng(0))
        assert {geometry.size for geometry in drawn} == {(64, 64)}
        assert 850 < sum(geometry.flip for geometry in drawn) < 1150
        longer = []
        for (height, width), geometry in zip(sizes, drawn):
            left, top, right, bottom = geometry.window
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            h, w = geometry.resized
            if max(h, w) < 64:
                # No crop: the whole image, in its proportions.
                assert geometry.window == (0, 0, width, height)
                assert abs(h / height - w / width) < 1 / 48
                longer.append(max(h, w))
            else:
                # The window has the proportions of the canvas' part, but for the rounding of either.
                x, y = w / (right - left), h / (bottom - top)
                assert x == pytest.approx(y, rel=0.1)
        assert min(longer) == 6
        # Scales are uniform: 0.1 to 1 are 9 of 19 parts.
        assert abs(len(longer) / len(drawn) - 9 / 19) < 0.05
        counts = np.histogram(longer, bins=[6, 21, 35, 49, 64])[0]
        assert counts.max() < 1.3 * counts.min()
        places = [g.window[1] for g in drawn[::2] if g.window[3] - g.window[1] < 40]
        assert min(places) == 0
        assert len(set(places)) > 8

    def test_boxes_masks_and_pixels_agree(self):
        image = np.zeros((48, 60, 3), np.uint8)
        image[20:40, 10:30] = 255
        mask = parse_segmentation([rectangle(10, 20, 30, 40)], 48, 60)
        drawn = draw_large_scale(np.tile([[48, 60]], (50, 1)), LSJ, np.random.default_rng(1))
        for geometry in drawn:
            result = apply_to_image(image, geometry)
            height, width = geometry.resized
            assert np.all(result[height:] == GREY)
            assert np.all(result[:, width:] == GREY)
            rows, columns = np.nonzero(result[:height, :width, 0] > 127)
            drawn_mask = draw_mask(mask, geometry.matrix, geometry.resized)
            (box,), (remains,) = apply_to_boxes(np.array([[10, 20, 30, 40]], np.float32), geometry)
            if not len(rows):
                assert drawn_mask.area < 10
                continue
            assert remains
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(drawn_mask.box, seen, atol=1)
            np.testing.assert_allclose(box, seen, atol=1)


def annotated(boxes, masks, crowds=()):
    """Annotations with one class for each object."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    parsed = tuple(mask and parse_segmentation(mask, *SIZE) for mask in masks)
    return ImageAnnotations(1, *SIZE, boxes, np.arange(len(boxes), dtype=np.int32), parsed, tuple(crowds))


def as_it_is(size=SIZE):
    """The geometry that changes nothing."""
    return Geometry((0, 0, size[1], size[0]), size)


def filled(*boxes: list[int], size=(100, 100)):
    """Objects whose masks fill their boxes, with one class for each."""
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return Objects(corners, np.arange(len(corners), dtype=np.int32), tuple(draw_box(box, size) for box in corners))


class TestObjects:
    def test_boxes_are_those_of_the_masks(self):
        gallows = [[10, 10, 30, 10, 30, 20, 20, 20, 20, 40, 10, 40]]
        found = masked_objects(annotated([[5, 5, 35, 45], [40, 10, 50, 20]], [gallows, None]), as_it_is())
        # The annotated box is larger than the mask; an object without one keeps its box.
        assert found.boxes.tolist() == [[10, 10, 30, 40], [40, 10, 50, 20]]
        assert [mask.area for mask in found.masks] == [400, 100]
        # A crop that leaves the lower part leaves the post alone.
        found = masked_objects(annotated([[5, 5, 35, 45]], [gallows]), Geometry((0, 20, 60, 50), (30, 60)))
        assert found.boxes.tolist() == [[10, 0, 20, 20]]

    def test_what_a_crop_leaves_nothing_of_is_no_object(self):
        triangle = [[10, 10, 30, 10, 10, 30]]
        # The corner of its box is in sight, its mask is not.
        corner = Geometry((25, 25, 60, 50), (25, 35))
        assert len(masked_objects(annotated([[10, 10, 30, 30]], [triangle]), corner)) == 0
        assert len(masked_objects(annotated([[10, 10, 30, 30]], [None]), corner)) == 1

    def test_how_many_are_donated(self):
        squares = [[10 * n, 0, 10 * n + 8, 8] for n in range(4)]
        donor = annotated([[0, 20, 10, 30], *squares], [None, *([rectangle(*box)] for box in squares)])
        crowd = parse_segmentation([rectangle(0, 40, 60, 50)], *SIZE)
        donor = dataclasses.replace(donor, crowds=(crowd,))
        rng = np.random.default_rng(0)
        drawn = [choose_donated(donor, as_it_is(), rng) for _ in range(3000)]
        # Four objects with masks and a crowd: from none to five, all as likely.
        numbers = Counter(len(objects) + len(crowds) for objects, crowds in drawn)
        assert numbers.keys() == {0, 1, 2, 3, 4, 5}
        assert max(numbers.values()) < 1.25 * min(numbers.values())
        labels = Counter(label for objects, _ in drawn for label in objects.labels.tolist())
        assert labels.keys() == {1, 2, 3, 4}
        assert max(labels.values()) < 1.15 * min(labels.values())
        assert all(len(set(objects.labels.tolist())) == len(objects) for objects, _ in drawn)
        assert any(crowds for _, crowds in drawn)
        assert all(crowd.box.tolist() == [0, 40, 60, 50] for _, crowds in drawn for crowd in crowds)
        nobody = annotated([], [])
        assert len(choose_donated(nobody, as_it_is(), rng)[0]) == 0

    def test_at_most_99_are_donated(self):
        boxes = [[n % 50, n // 50, n % 50 + 2, n // 50 + 2] for n in range(300)]
        donor = annotated(boxes, [[rectangle(*box)] for box in boxes])
        rng = np.random.default_rng(0)
        numbers = [len(choose_donated(donor, as_it_is(), rng)[0]) for _ in range(100)]
        assert 90 < max(numbers) <= 99


class TestPaste:
    def paste(self, objects, donated, crowds=()):
        image, donor = np.full((100, 100, 3), 10, np.uint8), np.full((100, 100, 3), 200, np.uint8)
        return paste(image, objects, donor, donated, list(crowds))

    def test_pixels(self):
        triangle = draw_mask(parse_segmentation([[20, 20, 60, 20, 20, 60]], 100, 100), AS_IT_IS, (100, 100))
        donated = Objects(triangle.box[None], np.zeros(1, np.int32), (triangle,))
        image, _ = self.paste(filled(), donated)
        np.testing.assert_array_equal(image[..., 0], np.where(canvas_of(triangle, (100, 100)), 200, 10))
        assert image[25, 25].tolist() == [200] * 3
        assert image[58, 58].tolist() == [10] * 3

    def test_boxes_shrink_to_what_is_visible(self):
        objects, donated = filled([10, 10, 50, 50], [60, 60, 90, 90]), filled([30, 0, 70, 55])
        _, result = self.paste(objects, dataclasses.replace(donated, labels=np.array([7], np.int32)))
        assert result.boxes.tolist() == [[10, 10, 30, 50], [60, 60, 90, 90], [30, 0, 70, 55]]
        assert result.labels.tolist() == [0, 1, 7]
        assert [mask.area for mask in result.masks] == [800, 900, 40 * 55]

    @pytest.mark.parametrize(
        ("box", "cover", "stays"),
        [
            ([10, 10, 50, 50], [0, 0, 60, 60], False),
            # A strip of 8 x 40 pixels is more than 300; one of 7 x 40 is less.
            ([10, 10, 50, 50], [18, 0, 60, 60], True),
            ([10, 10, 50, 50], [17, 0, 60, 60], False),
            ([10, 10, 40, 40], [20, 0, 60, 60], False),
            ([10, 10, 40, 41], [20, 0, 60, 35], True),
            # Small objects stay while their box moves by at most ten pixels.
            ([10, 10, 30, 22], [20, 0, 60, 60], True),
            ([10, 10, 30, 22], [19, 0, 60, 60], False),
            # Nothing visible, near the corner where empty boxes lie.
            ([0, 0, 8, 8], [0, 0, 60, 60], False),
        ],
    )
    def test_hidden_objects_are_dropped(self, box, cover, stays):
        _, result = self.paste(filled(box), filled(cover))
        assert len(result) == 1 + stays
        assert result.boxes[-1].tolist() == cover

    def test_crowds_hide_and_are_no_objects(self):
        crowd = draw_box(np.array([0, 0, 60, 60]), (100, 100))
        image, result = self.paste(filled([10, 10, 50, 50], [70, 70, 90, 90]), filled(), [crowd])
        assert result.boxes.tolist() == [[70, 70, 90, 90]]
        assert image[30, 30, 0] == 200
        assert image[80, 80, 0] == 10

    def test_objects_that_overlap_keep_their_masks(self):
        _, result = self.paste(filled([10, 10, 50, 50], [20, 20, 60, 60]), filled([0, 90, 10, 100]))
        assert [mask.area for mask in result.masks] == [1600, 1600, 100]
