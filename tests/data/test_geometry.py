"""What a geometry does to images and boxes, and which geometries are drawn."""

import numpy as np
import tiny

from hpr_jax.data.augmentation.crop_resize_flip import (
    Geometry,
    apply_to_boxes,
    apply_to_image,
    draw_weak,
    evaluation_geometries,
    fit,
)


class TestGeometry:
    def test_fit(self):
        sizes = fit(np.array([480, 1000]), np.array([640, 100]), np.array([800.0, 800.0]), 1333)
        assert sizes.tolist() == [[800, 1067], [1333, 133]]

    def test_boxes_follow_crop_resize_and_flip(self):
        image = np.zeros((100, 200, 3), np.uint8)
        image[40:60, 100:140] = 255
        geometry = Geometry(window=(80, 20, 180, 70), size=(100, 400), flip=True)
        out = apply_to_image(image, geometry)
        boxes, remains = apply_to_boxes(np.array([[100, 40, 140, 60], [0, 0, 20, 20]], np.float32), geometry)
        # Window 100x50 -> 400x100: x4 and x2, then mirrored; the second box is outside.
        assert boxes[0].tolist() == [160, 40, 320, 80]
        assert remains.tolist() == [True, False]
        assert out[60, 240].tolist() == [255] * 3
        assert out[30, 240].tolist() == [0] * 3
        assert out[60, 150].tolist() == [0] * 3

    def test_evaluation_keeps_everything(self):
        (geometry,) = evaluation_geometries(np.array([[480, 640]]), 800, 1333)
        assert geometry == Geometry((0, 0, 640, 480), (800, 1067), False)

    def test_drawn_geometries_stay_within_their_settings(self):
        sizes = np.tile([[100, 150], [90, 60]], (200, 1))
        drawn = draw_weak(sizes, tiny.WEAK, np.random.default_rng(0))
        for (height, width), geometry in zip(sizes, drawn):
            left, top, right, bottom = geometry.window
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert min(geometry.size) in (48, 64) or max(geometry.size) == 96
            assert max(geometry.size) <= 96
        assert 150 < sum(geometry.flip for geometry in drawn) < 250
        cropped = [g.window != (0, 0, w, h) for (h, w), g in zip(sizes, drawn)]
        assert 150 < sum(cropped) < 250
        # A crop's sides, at the intermediate scale, lie in crop_range.
        scale = [min(60 / 100, 1), 80 / 100]
        widths = [g.window[2] - g.window[0] for g, c in zip(drawn[::2], cropped[::2]) if c]
        assert min(widths) >= 40 / scale[1] - 2
        assert max(widths) <= 70 / scale[0] + 2

    def test_crops_lie_anywhere(self):
        """Where a crop begins, as a fraction of where it can: uniform along both sides, which are not resized before it."""
        settings = {**tiny.WEAK, "crop": 1.0, "crop_sides": (480,), "crop_range": (100, 200)}
        drawn = draw_weak(np.array([[480, 640]] * 400), settings, np.random.default_rng(0))
        windows = np.array([geometry.window for geometry in drawn])
        start = windows[:, :2] / ([640, 480] - (windows[:, 2:] - windows[:, :2]))
        assert np.all((start.min(axis=0) < 0.02) & (start.max(axis=0) > 0.98))
        np.testing.assert_allclose(start.mean(axis=0), 0.5, atol=0.05)
        assert abs(np.corrcoef(start.T)[0, 1]) < 0.2


def test_images_on_a_canvas():
    """An image lies at the top left of a grey square, and its boxes with it."""
    image = np.full((40, 80, 3), 250, np.uint8)
    (geometry,) = evaluation_geometries(np.array([image.shape[:2]]), 64, 64, canvas=64)
    out = apply_to_image(image, geometry)
    moved, _ = apply_to_boxes(np.array([[40, 0, 80, 40]], np.float32), geometry)
    assert geometry.resized == (32, 64)
    assert out.shape == (64, 64, 3)
    assert np.all(out[:32] == 250)
    assert np.all(out[32:] == 114)
    np.testing.assert_allclose(moved, [[32, 0, 64, 32]])
