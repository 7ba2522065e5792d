"""Each view has its own boxes, with the labels and pixels of its own objects, up to the batch and the devices."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
import tiny
from pictures import BLUE, GREEN, RED, dataset, plain

from hpr_jax.data.augmentation.geometry import Geometry, Slot
from hpr_jax.data.augmentation.strong_view import StrongView
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.build import make_views, room_for_boxes
from hpr_jax.data.loading.batches import TrainLoader
from hpr_jax.data.loading.plan import PlannedBatch, TrainPlan
from hpr_jax.runtime.devices import data_mesh
from hpr_jax.training.loop import to_devices
from hpr_jax.training.parts import side_by_side as _side_by_side

# A quarter turn to the right is about the centre of the middle pixel: (x, y) -> (99 - y, x) in an image of side 100.
MOVES = [
    ("rotate", 90.0, [45, 35, 65, 55]),
    ("rotate", -90.0, [34, 44, 54, 64]),
    ("shear_x", 45.0, [69, 34, 100, 54]),
    ("shear_x", -45.0, [0, 34, 21, 54]),
    ("shear_y", 45.0, [35, 69, 55, 100]),
    ("shear_y", -45.0, [35, 0, 55, 19]),
    ("translate_x", 0.1, [45, 34, 65, 54]),
    ("translate_x", -0.1, [25, 34, 45, 54]),
    ("translate_y", 0.1, [35, 44, 55, 64]),
    ("translate_y", -0.1, [35, 24, 55, 44]),
]
BOX = [35, 34, 55, 54]


@pytest.fixture
def strong(monkeypatch):
    """Makes all strong views alike."""

    def change(geometric="translate_x", magnitude=0.0, patches=(), colour="identity", strength=1.0):
        def draw(size, rng):
            return StrongView(size, colour, strength, geometric, magnitude, True, tuple(patches))

        monkeypatch.setattr("hpr_jax.data.augmentation.views.draw_strong_view", draw)

    change()
    return change


def uncropped(height, width, flip=False):
    """The geometry that at most mirrors an image of this size."""
    return Geometry((0, 0, width, height), (height, width), flip)


def nothing_donated(sizes, rng):
    """Geometries of donors that leave none of their objects."""
    return [Geometry((0, 0, 1, 1), (100, 100))]


def views_of(pictures, geometry, seed=(0, 0, 1), index=0, **settings):
    views, reports = ViewMaker(pictures, strong=True, **settings)(Slot(index, geometry, seed))
    assert not reports
    return views


def with_object(box, height=100, width=100, colour=GREEN):
    """A black image with one object of a colour."""
    image = plain(height, width, (0, 0, 0))
    left, top, right, bottom = box
    image[top:bottom, left:right] = colour
    return image


class TestBoxesOfStrongViews:
    @pytest.mark.parametrize("with_masks", [False, True])
    @pytest.mark.parametrize(("geometric", "magnitude", "expected"), MOVES)
    def test_follow_the_geometric_operation(self, strong, geometric, magnitude, expected, with_masks):
        """Also where boxes come from masks, which copy-paste wants."""
        strong(geometric, magnitude)
        pictures = dataset([with_object(BOX)], [[BOX]], masks=with_masks)
        settings = {"draw_donor": nothing_donated} if with_masks else {}
        weak, moved = views_of(pictures, uncropped(100, 100), **settings)
        assert weak.objects.boxes.tolist() == [BOX]
        assert moved.objects.boxes[0] == pytest.approx(expected, abs=1e-3)
        if with_masks:
            (mask,) = moved.objects.masks
            assert mask.box == pytest.approx(expected, abs=1.01)

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(("geometric", "magnitude", "_"), MOVES)
    def test_lie_around_the_pixels(self, strong, geometric, magnitude, _, flip):
        """Of images that are flipped and not square, in both views."""
        strong(geometric, min(max(magnitude, -20), 20))
        box = [25, 30, 45, 50]
        image = with_object(box, 80, 120)
        for view in views_of(dataset([image], [[box]]), uncropped(80, 120, flip)):
            rows, columns = np.nonzero(view.image[..., 1] > 190)
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert view.objects.boxes[0] == pytest.approx(around, abs=2)

    def test_are_clipped(self, strong):
        strong("translate_x", 0.1)
        _, moved = views_of(dataset([plain(100, 100, RED)], [[[85, 0, 99, 10], [20, 20, 30, 30]]]), uncropped(100, 100))
        assert moved.objects.boxes.tolist() == [[95, 0, 100, 10], [30, 20, 40, 30]]

    def test_start_from_the_weak_ones(self, strong):
        """Cropped to 80 x 40, flipped and halved to 40 x 20: translations are a tenth of that."""
        geometry = Geometry((20, 10, 100, 50), (20, 40), flip=True)
        pictures = dataset([plain(60, 120, RED)], [[[0, 0, 15, 60], [30, 20, 40, 40], [90, 0, 120, 60]]])
        for geometric, magnitude, expected in (
            ("translate_x", 0.1, [[34, 5, 39, 15], [4, 0, 9, 20]]),
            ("translate_y", 0.1, [[30, 7, 35, 17], [0, 2, 5, 20]]),
        ):
            strong(geometric, magnitude)
            weak, moved = views_of(pictures, geometry)
            assert weak.objects.boxes.tolist() == [[30, 5, 35, 15], [0, 0, 5, 20]]
            assert moved.objects.boxes.tolist() == expected
            assert weak.objects.labels.tolist() == moved.objects.labels.tolist() == [1, 2]
            assert weak.image.shape == moved.image.shape == (20, 40, 3)

    def test_colours_of_strong_views_alone_change(self, strong):
        strong(colour="brightness", strength=0.5)
        weak, darker = views_of(dataset([plain(40, 40, (200, 100, 50))], [[[0, 0, 9, 9]]]), uncropped(40, 40))
        assert weak.image[5, 5].tolist() == [200, 100, 50]
        assert darker.image[5, 5].tolist() == [100, 50, 25]


class OneBatch(TrainPlan):
    """A plan of a single batch."""

    steps_per_epoch = 1

    def __init__(self, shape, slots):
        self.batch_size, self.batch = len(slots), PlannedBatch(shape, tuple(slots))

    def __getitem__(self, step):
        return self.batch


class TestPlacesInABatch:
    def batch(self, strong, **settings):
        """Two images of other sizes with other objects, whose strong views lose the middle one of the first."""
        strong("translate_y", 0.1, patches=[(40, 47, 60, 68)])
        first, second = [[0, 10, 20, 30], [40, 40, 60, 60], [70, 0, 100, 20]], [[0, 0, 25, 25]]
        pictures = dataset([plain(80, 100, RED), plain(50, 50, BLUE)], [first, second], labels=[[2, 0, 1], [1]])
        slots = [Slot(0, uncropped(80, 100), (1,)), Slot(1, uncropped(50, 50), (2,))]
        loader = TrainLoader(OneBatch((96, 128), slots), ViewMaker(pictures, strong=True, **settings), max_boxes=4)
        return loader[0]

    def test_labels_and_validity_stay_with_their_boxes(self, strong):
        batch = self.batch(strong)
        assert batch.valid.tolist() == [[place < count for place in range(4)] for count in (3, 1, 2, 1)]
        assert [labels[valid].tolist() for labels, valid in zip(batch.labels, batch.valid)] == [[2, 0, 1], [1], [2, 1], [1]]

    def test_boxes_are_relative_to_the_size_of_their_own_image(self, strong):
        batch = self.batch(strong)
        assert batch.sizes.tolist() == [[80, 100], [50, 50], [80, 100], [50, 50]]
        expected = [
            [[0.1, 0.25, 0.2, 0.25], [0.5, 0.625, 0.2, 0.25], [0.85, 0.125, 0.3, 0.25]],
            [[0.25, 0.25, 0.5, 0.5]],
            [[0.1, 0.35, 0.2, 0.25], [0.85, 0.225, 0.3, 0.25]],
            [[0.25, 0.35, 0.5, 0.5]],
        ]
        for boxes, valid, wanted in zip(batch.boxes, batch.valid, expected):
            np.testing.assert_allclose(boxes[valid], wanted, atol=1e-6)

    def test_images_are_rgb_and_padded_at_the_right_and_bottom(self, strong):
        batch = self.batch(strong)
        for place, colour in enumerate((RED, BLUE, RED, BLUE)):
            height, width = batch.sizes[place]
            assert batch.images[place, height - 1, 5].tolist() == list(colour)
            assert not batch.images[place, height:].any()
            assert not batch.images[place, :, width:].any()
        assert batch.images[0, 0, 0].tolist() == list(RED)
        # Bared by the translation.
        assert batch.images[2, 0, 0].tolist() == [128] * 3
        assert [record.image_id for record in batch.records] == [10, 11, 10, 11]

    def test_devices_get_views_by_images(self, strong):
        """`[views, images, ...]`; in a step, the views of an image are neighbours."""
        batch = self.batch(strong)
        on_devices = to_devices(batch, data_mesh(jax.devices()[:1]), {"reports": 3})
        assert on_devices.images.shape == (2, 2, 96, 128, 3)
        assert np.asarray(on_devices.counts["reports"]).tolist() == [3]
        together = _side_by_side((on_devices.images, on_devices.targets))
        for view in range(2):
            for image in range(2):
                place, targets = view * 2 + image, on_devices.targets
                np.testing.assert_array_equal(on_devices.images[view, image], batch.images[place])
                np.testing.assert_array_equal(together[0][image * 2 + view], batch.images[place])
                for name in ("boxes", "labels", "valid", "sizes"):
                    np.testing.assert_array_equal(getattr(targets, name)[view, image], getattr(batch, name)[place])
                    np.testing.assert_array_equal(getattr(together[1], name)[image * 2 + view], getattr(batch, name)[place])


class TestVanishedObjects:
    @pytest.mark.parametrize("drop", [False, True])
    def test_stay_or_go_as_the_config_says(self, strong, drop):
        """The first object is moved out of sight."""
        strong("shear_x", 45.0)
        config = tiny.config()
        config.augmentation.update(strong_views=True, drop_vanished=drop)
        pictures = dataset([plain(100, 100, RED)], [[[60, 70, 80, 90], [10, 0, 20, 10]]])
        views, _ = make_views(config, pictures)(Slot(0, uncropped(100, 100), (0,)))
        assert views[0].objects.labels.tolist() == [0, 1]
        assert views[1].objects.labels.tolist() == ([1] if drop else [0, 1])

    def test_there_are_strong_views_if_the_config_says_so(self):
        config = tiny.config()
        pictures = dataset([plain(40, 40, RED)], [[[0, 0, 9, 9]]])
        for config.augmentation.strong_views in (False, True):
            assert make_views(config, pictures).count == 1 + config.augmentation.strong_views


class TestPastedObjects:
    """A blue image without objects, and a red one whose only object is pasted onto it."""

    PICTURES = dataset([plain(40, 40, BLUE), plain(40, 40, RED)], [[], [[5, 10, 20, 30]]], labels=[[], [2]], masks=True)

    def made(self, seeds=range(60), flip=False, strong=True):
        def draw(sizes, rng):
            return [uncropped(40, 40, flip)]

        views = ViewMaker(self.PICTURES, strong=strong, draw_donor=draw)
        return [views(Slot(0, uncropped(40, 40), (seed,)))[0] for seed in seeds]

    @pytest.mark.parametrize(("flip", "box"), [(False, [5, 10, 20, 30]), (True, [20, 10, 35, 30])])
    def test_come_with_their_pixels_box_and_label(self, strong, flip, box):
        pasted = [view for views in self.made(flip=flip) for view in views if len(view.objects)]
        assert pasted
        for view in pasted:
            assert view.objects.boxes.tolist() == [box]
            assert view.objects.labels.tolist() == [2]
            expected = with_object(box, 40, 40, RED)
            expected[~expected.any(axis=-1)] = BLUE
            np.testing.assert_array_equal(view.image, expected)

    def test_are_others_in_each_view_and_for_each_seed(self, strong):
        """One image of two is the donor, and its object is pasted every second time: in a quarter of the views."""
        counts = Counter(tuple(len(view.objects) for view in views) for views in self.made(range(200)))
        assert counts.keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}
        assert 20 < counts[0, 1] < 60
        assert 20 < counts[1, 0] < 60

    def test_are_not_what_decides_the_weak_view(self, strong):
        """The weak view's donor is drawn from the slot's seed alone, whatever else the run draws."""
        one, again = self.made(range(20)), self.made(range(20))
        assert all(np.array_equal(a.image, b.image) for x, y in zip(one, again) for a, b in zip(x, y))

    def test_settings_of_a_config_reach_the_donors(self):
        config = tiny.config()
        config.augmentation.update(kind="lsj", flip=1.0, lsj={"side": 48, "scale_range": (0.5, 0.5)})
        views = make_views(config, self.PICTURES)
        assert views.draw_donor is not None
        (geometry,) = views.draw_donor(np.array([[40, 40]]), rng=np.random.default_rng(0))
        assert geometry == Geometry((0, 0, 40, 40), (48, 48), True, (24, 24))
        # Room for the objects of the fullest image, and for those of a donor.
        config.data.max_boxes = 0
        assert room_for_boxes(config, self.PICTURES, views) == 2
        config.augmentation.lsj.copy_paste = False
        assert make_views(config, self.PICTURES).draw_donor is None


def test_weak_views_alone_are_those_of_the_geometry():
    geometry = Geometry((10, 0, 50, 30), (60, 80), flip=True, content=(30, 40))
    pictures = dataset([with_object([20, 10, 30, 20], 30, 50)], [[[20, 10, 30, 20], [0, 0, 9, 9]]])
    ((view,), _) = ViewMaker(pictures)(Slot(0, dataclasses.replace(geometry), ()))
    assert view.objects.boxes.tolist() == [[20, 10, 30, 20]]
    assert view.image[15, 25].tolist() == list(GREEN)
    assert view.image[15, 15].tolist() == [0, 0, 0]
    # Grey around the content.
    assert view.image[45, 60].tolist() == [114] * 3
