"""Files of images with any damage are decoded to pixels, or they are unreadable: nothing else comes of them."""

import functools

import cv2
import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st
from mutations import damaged_bytes, examples

from hpr_jax.data.decoding import bits_if_dark
from hpr_jax.data.images import ImageFile, UnreadableImageError, read_annotated_image, read_image

SUFFIXES = (".png", ".jpg", ".webp", ".bmp", ".tiff", ".gif", ".ppm", ".pgm", ".hdr", ".jp2", ".ras", ".avif")
HEIGHT, WIDTH = 24, 40


@functools.cache
def whole_files() -> dict[str, bytes]:
    """A file of each format that OpenCV writes here; some with 16 bits, one channel or opacity."""
    rng = np.random.default_rng(0)
    pixels = cv2.GaussianBlur(rng.integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8), (5, 5), 0)
    kinds = {"": pixels, "grey": pixels[..., 0], "deep": pixels.astype(np.uint16) << 4, "alpha": np.dstack([pixels, pixels])}
    files = {}
    for suffix in SUFFIXES:
        for kind, array in kinds.items():
            if kind and suffix not in (".png", ".tiff"):
                continue
            try:
                written, data = cv2.imencode(suffix, array[..., :4] if kind == "alpha" else array)
            except cv2.error:
                continue
            if written:
                files[kind + suffix] = data.tobytes()
    assert {".png", "deep.png", ".jpg", ".webp", ".tiff", ".hdr"} <= files.keys()
    return files


@examples(100, 2000)
@given(st.data())
def test_any_damage(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(sorted(whole_files())))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.rpartition('.')[-1]}"
    path.write_bytes(data.draw(damaged_bytes(whole_files()[kind])))
    for read in (read_image, lambda path: read_annotated_image(ImageFile(path), HEIGHT, WIDTH)):
        try:
            pixels = read(path)
        except UnreadableImageError as error:
            event("unreadable")
            sentence = str(error)
            assert sentence.startswith(str(path))
            continue
        event("decoded")
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)
        assert bits_if_dark(path.read_bytes(), pixels) in range(17)
        if read is not read_image:
            assert pixels.shape == (HEIGHT, WIDTH, 3)


def test_whole_files_are_decoded(tmp_path):
    for kind, data in whole_files().items():
        path = tmp_path / kind
        path.write_bytes(data)
        assert read_annotated_image(ImageFile(path), HEIGHT, WIDTH).shape == (HEIGHT, WIDTH, 3), kind
