"""From bytes to pixels: what is taken, and what hostile images cost."""

import pytest

pytest.importorskip("starlette", reason="The extra `serve` is not installed.")

import io
import struct
import time
import zlib

import numpy as np
import tiny
from hypothesis import event, given
from hypothesis import strategies as st
from mutations import FOREIGN_WORDS, examples
from pictures import RED, plain, png
from PIL import Image

from hpr_jax.serving.limits import Limits
from hpr_jax.serving.refusal import Refusal
from hpr_jax.serving.uploads import decode_upload

LIMITS = Limits(pixels=10_000)


def encoded(kind, size=(40, 20), colour=RED, **options):
    """A file of one colour; its size is (width, height)."""
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind, **options)
    return data.getvalue()


def refusal(data, limits=LIMITS):
    with pytest.raises(Refusal) as caught:
        decode_upload(data, limits, 16)
    return caught.value.status, str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_formats(kind):
    pixels = decode_upload(encoded(kind), LIMITS, 16)
    assert pixels.shape == (20, 40, 3)
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), RED, atol=4)


def test_photographs_of_telephones():
    """They are turned, or several in one file, of which the first is the photograph."""
    several = encoded("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert decode_upload(several, LIMITS, 16).shape == (20, 40, 3)


def test_turned(tmp_path):
    tiny.write_turned(tmp_path / "turned.jpg", plain(20, 40, RED), 6)
    assert decode_upload((tmp_path / "turned.jpg").read_bytes(), LIMITS, 16).shape == (40, 20, 3)


def test_samples_of_sixteen_bits():
    data = io.BytesIO()
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(data, "PNG")
    assert decode_upload(data.getvalue(), LIMITS, 12).max() == 4000 >> 4


@pytest.mark.parametrize(
    "data", [b"x", b"<svg/>", encoded("PPM"), encoded("GIF"), encoded("PNG")[:30], encoded("JPEG")[:300]]
)
def test_what_is_none_of_the_formats(data):
    assert refusal(data) == (415, "This is no JPEG, PNG, WebP, BMP or TIFF image, or it is damaged.")


@pytest.mark.parametrize("data", [encoded("PNG")[:60], encoded("BMP")[:60]])
def test_what_only_begins_like_an_image(data):
    status, sentence = refusal(data)
    assert status == 400
    assert sentence == "The upload is not an image that can be decoded."


def bomb(width, height):
    """A PNG of a few bytes that claims many pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(101, 100), (30_000, 30_000), (2**31 - 1, 1)])
def test_too_many_pixels_are_never_made(size):
    start = time.perf_counter()
    assert refusal(bomb(*size)) == (413, "An image may have 10,000 pixels, and this one has more; send a smaller image.")
    assert time.perf_counter() - start < 0.5


def test_as_many_pixels_as_there_may_be():
    assert decode_upload(encoded("PNG", (100, 100)), LIMITS, 16).shape == (100, 100, 3)


def test_a_jpeg_with_scans_without_end():
    """Each scan of a progressive JPEG takes as long as the first, though it may have ten bytes."""
    data = encoded("JPEG", (4000, 3000), progressive=True)
    limits = Limits()
    assert decode_upload(data, limits, 16).shape == (3000, 4000, 3)
    scan = data[data.rfind(b"\xff\xda") : -2]
    endless = data[:-2] + scan * 1000 + data[-2:]
    assert refusal(endless, limits) == (400, "The JPEG image has too many scans; save it as a baseline JPEG.")


FILES = [encoded(kind) for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP")]


@examples(60, 20_000)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_images(file, changes):
    """They are decoded, or refused in a sentence."""
    data = bytearray(file)
    for place, value in changes:
        data[place % len(data)] = value
    refused = None
    try:
        pixels = decode_upload(bytes(data), LIMITS, 16)
    except Refusal as error:
        refused = error
        event("refused")
    if refused:
        assert refused.status in (400, 413, 415)
        assert not any(word in str(refused) for word in FOREIGN_WORDS)
    else:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)


def test_png_of_pictures_is_read_without_loss():
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode_upload(png(picture), LIMITS, 16), picture)
