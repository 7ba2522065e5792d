"""Tiles: where they lie, and that objects on their seams are found once. A stand-in finds squares of one colour exactly."""

import cv2
import numpy as np
import pytest

from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.tiles import Tiling, detect_in_tiles

COLOURS = {"cup": (255, 0, 0), "pen": (0, 0, 255)}


class Finder:
    """Finds squares by their colour, cut off at the border of what it is shown; larger parts have higher scores."""

    def __init__(self):
        self.shapes, self.batches = set(), []

    def __call__(self, images, threshold):
        self.shapes |= {image.shape for image in images}
        self.batches.append(len(images))
        return [self.one(image, threshold) for image in images]

    @staticmethod
    def one(image, threshold):
        rows = []
        for label, colour in enumerate(COLOURS.values()):
            mask = np.all(image == colour, axis=-1).astype(np.uint8)
            _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
            rows += [(x, y, x + w, y + h, min(area / 2000, 0.99), label) for x, y, w, h, area in stats[1:]]
        table = np.array([row for row in rows if row[4] >= threshold], np.float32).reshape(-1, 6)
        labels = table[:, 5].astype(np.int32)
        names = [list(COLOURS)[label] for label in labels]
        return Detections(image, table[:, :4], table[:, 4], labels, names, [10 * label for label in labels])


def picture(height, width, *squares):
    image = np.full((height, width, 3), 90, np.uint8)
    for name, left, top, side in squares:
        image[top : top + side, left : left + side] = COLOURS[name]
    return image


def find(image, threshold=0.0, **tiling):
    finder = Finder()
    return detect_in_tiles(finder, image, Tiling(**tiling), threshold, batch_size=4), finder


class TestWhereTilesLie:
    def test_they_cover_everything_and_overlap(self):
        tiling = Tiling(100, 0.2)
        starts = tiling.starts(1000)
        assert starts[0] == 0
        assert starts[-1] == 900
        assert all(20 <= first + 100 - second <= 100 for first, second in zip(starts, starts[1:]))

    def test_a_picture_of_their_size_is_one(self):
        assert Tiling(100).corners(100, 100) == [(0, 0)]
        assert Tiling(100).corners(40, 100) == [(0, 0)]

    def test_one_pixel_more_makes_two(self):
        assert Tiling(100).corners(100, 101) == [(0, 0), (0, 1)]

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"side": 0}, "side of 0 pixels"),
            ({"side": 9, "overlap": 0.95}, "overlap by 0.95"),
            ({"side": 9, "overlap": float("nan")}, "overlap by nan"),
            ({"side": 9, "merge": "wbf"}, "by nmm or nms, not by 'wbf'"),
        ],
    )
    def test_impossible_ones_are_told(self, settings, sentence):
        with pytest.raises(UserError, match=sentence):
            Tiling(**settings)


class TestObjects:
    def test_of_a_large_picture_are_found_once_each(self):
        """Three hundred squares in a picture of 4000 x 6000 pixels, many of them on seams of its 63 tiles."""
        rng = np.random.default_rng(0)
        places = [(x, y) for x in range(40, 5900, 290) for y in range(40, 3900, 260)]
        squares = [(rng.choice(list(COLOURS)), x, y, int(rng.integers(30, 90))) for x, y in places]
        found, finder = find(picture(4000, 6000, *squares), side=800, overlap=0.2)
        expected = sorted((x, y, x + side, y + side, name) for name, x, y, side in squares)
        assert sorted((*map(int, box), name) for box, name in zip(found.boxes.tolist(), found.names)) == expected
        assert finder.shapes == {(800, 800, 3)}
        assert max(finder.batches) == 4

    def test_larger_than_the_overlap_are_joined_of_their_parts(self):
        """No tile shows all of it: they are 100 wide."""
        image = picture(300, 400, ("cup", 60, 50, 190))
        found, _ = find(image, side=100, overlap=0.6)
        assert found.boxes.tolist() == [[60, 50, 250, 240]]

    def test_of_other_classes_stay_apart(self):
        image = picture(200, 300, ("cup", 60, 50, 90), ("pen", 80, 70, 20))
        found, _ = find(image, side=160, overlap=0.6)
        assert sorted(found.names) == ["cup", "pen"]
        assert sorted(found.category_ids) == [0, 10]

    def test_by_nms_the_best_part_is_kept(self):
        image = picture(100, 300, ("cup", 70, 20, 40))
        found, _ = find(image, side=100, overlap=0.5, merge="nms")
        assert found.boxes.tolist()[0] == [70, 20, 110, 60]

    def test_come_best_first_and_above_the_threshold(self):
        image = picture(100, 300, ("cup", 10, 20, 20), ("pen", 150, 20, 40), ("cup", 250, 20, 30))
        found, _ = find(image, side=100)
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        assert len(find(image, 0.3, side=100)[0]) == 2

    def test_there_may_be_none(self):
        found, _ = find(picture(150, 150), side=100)
        assert len(found) == 0
        assert found.boxes.shape == (0, 4)
