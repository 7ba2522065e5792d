"""Decoding of images: orientation, colours, what cannot be read."""

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny

from hpr_jax.data.images import ImageFile, OtherSizeError, UnreadableImageError, read_annotated_image, read_image


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


def write_claim(path, width, height):
    """A PNG of a few bytes whose header claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


class TestFilesThatWouldTakeTheMachine:
    @pytest.mark.parametrize("read", [read_image, lambda path: read_annotated_image(ImageFile(path), 48, 60)])
    def test_no_regular_files(self, tmp_path, read):
        os.mkfifo(tmp_path / "pipe.jpg")
        for path in (tmp_path / "pipe.jpg", Path("/dev/zero"), Path("/dev/null")):
            with pytest.raises(UnreadableImageError, match="is no regular file"):
                read(path)
        with pytest.raises(UnreadableImageError, match="Is a directory"):
            read(tmp_path)
        (tmp_path / "loop.jpg").symlink_to("loop.jpg")
        with pytest.raises(UnreadableImageError, match="Too many levels"):
            read(tmp_path / "loop.jpg")
        with pytest.raises(UnreadableImageError, match="no possible name"):
            read(Path("a\0.jpg"))

    def test_large_files_are_not_read(self, tmp_path):
        """The file has holes, and takes no space."""
        with (tmp_path / "x.jpg").open("wb") as file:
            file.truncate(2**31)
        with pytest.raises(UnreadableImageError, match=r"has 2,147,483,648 bytes, and an image may have 1,073,741,824"):
            read_image(tmp_path / "x.jpg")

    def test_pixels_are_not_made_before_the_size_is_known(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hpr_jax.data.decoding.cv2.imdecode", None)
        write_claim(tmp_path / "x.png", 20_000, 20_000)
        with pytest.raises(UnreadableImageError, match="has more than the 178,956,970 pixels that an image may have"):
            read_image(tmp_path / "x.png")
        write_claim(tmp_path / "x.png", 9_000, 8_000)
        with pytest.raises(OtherSizeError, match="is 9000x8000 pixels, its annotation says 60x48"):
            read_annotated_image(ImageFile(tmp_path / "x.png"), 48, 60)

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tiff", ".ppm", ".gif", ".hdr", ".sr"])
    def test_formats_are_read_as_before(self, tmp_path, suffix):
        """Also one that Pillow does not know, whose header cannot be looked at."""
        pixels = np.full((48, 60, 3), 200, np.uint8)
        assert cv2.imwrite(str(tmp_path / f"x{suffix}"), pixels)
        assert read_annotated_image(ImageFile(tmp_path / f"x{suffix}"), 48, 60).shape == (48, 60, 3)
