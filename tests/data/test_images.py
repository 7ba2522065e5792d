"""Decoding of images: orientation, colours, what cannot be read."""

import cv2
import numpy as np
import pytest
import tiny

from hpr_jax.data.images import ImageFile, UnreadableImageError, read_annotated_image, read_image


class TestImages:
    def exif(self, tmp_path, orientation):
        """A JPEG with an EXIF orientation; the left half of the stored pixels is bright."""
        path = tmp_path / f"exif{orientation}.jpg"
        pixels = np.zeros((20, 40, 3), np.uint8)
        pixels[:, :20] = 255
        tiny.write_turned(path, pixels, orientation)
        return path

    def test_exif_rotation_is_applied(self, tmp_path):
        path = self.exif(tmp_path, 6)
        image = read_image(path)
        assert image.shape == (40, 20, 3)
        assert image[5].mean() > 200
        assert read_annotated_image(ImageFile(path), 40, 20).shape == (40, 20, 3)

    def test_annotations_on_stored_pixels_are_honoured(self, tmp_path):
        image = read_annotated_image(ImageFile(self.exif(tmp_path, 6)), 20, 40)
        assert image.shape == (20, 40, 3)
        assert image[:, 5].mean() > 200

    def test_colours_are_rgb(self, tmp_path):
        cv2.imwrite(str(tmp_path / "blue.png"), np.full((4, 4, 3), (255, 0, 0), np.uint8))
        assert read_image(tmp_path / "blue.png")[0, 0].tolist() == [0, 0, 255]

    def test_unreadable(self, tmp_path):
        (tmp_path / "text.jpg").write_text("no image")
        (tmp_path / "empty.jpg").write_bytes(b"")
        for name in ("text.jpg", "empty.jpg", "missing.jpg"):
            with pytest.raises(UnreadableImageError, match=name):
                read_image(tmp_path / name)
        with pytest.raises(UnreadableImageError, match="annotation says 30x30"):
            read_annotated_image(ImageFile(self.exif(tmp_path, 1)), 30, 30)
