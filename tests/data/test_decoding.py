"""Images with samples of 16 bits: the rule, by which way they come, and that dark ones are told."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tiny
from folders import edit
from hypothesis import given, settings
from hypothesis import strategies as st

from hpr_jax.analysis.data_verdict import Verdict
from hpr_jax.analysis.dataset import open_images
from hpr_jax.data import images
from hpr_jax.data.build import load_dataset, load_training_data
from hpr_jax.data.decoding import bits_if_dark, to_eight_bits
from hpr_jax.data.images import ImageOfFewerBits, read_annotated_image, read_image
from hpr_jax.data.suitability import check_evaluation_data


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(images, "_said", set())


def encoded(samples, suffix=".png"):
    return cv2.imencode(suffix, samples)[1].tobytes()


def twelve_bits(shape=(48, 60, 3)):
    """A picture whose samples use 12 of 16 bits."""
    samples = np.random.default_rng(0).integers(0, 2**12, shape).astype(np.uint16)
    samples[0, 0] = 2**12 - 1
    return samples


@pytest.mark.parametrize(
    ("bits", "sample", "expected"),
    [
        (16, 0, 0),
        (16, 255, 0),
        (16, 256, 1),
        (16, 65535, 255),
        (12, 15, 0),
        (12, 16, 1),
        (12, 4095, 255),
        (12, 4096, 255),
        (12, 65535, 255),
        (10, 1023, 255),
        (10, 512, 128),
        (8, 200, 200),
        (8, 256, 255),
    ],
)
def test_the_rule(bits, sample, expected):
    found = to_eight_bits(np.array([sample], np.uint16), bits)
    assert (found.dtype, found.tolist()) == (np.uint8, [expected])


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".ppm"])
@pytest.mark.parametrize("colours", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_files(tmp_path, suffix, colours, bits):
    """Opacity is left out, and OpenCV writes blue first."""
    if suffix == ".ppm":
        suffix, colours = (".pgm", 1) if colours == 1 else (".ppm", 3)
    samples = np.random.default_rng(0).integers(0, 2**bits, (20, 30, colours)).astype(np.uint16)
    if colours == 4:
        samples[..., 3] = 65535
    (tmp_path / f"x{suffix}").write_bytes(encoded(samples, suffix))
    expected = np.repeat(samples, 3, axis=2) if colours == 1 else samples[..., 2::-1]
    np.testing.assert_array_equal(read_image(tmp_path / f"x{suffix}", bits), to_eight_bits(expected, bits))


def test_images_of_8_bits_stay_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 60, (20, 30, 3)).astype(np.uint8)
    for suffix in (".png", ".jpg"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(encoded(pixels, suffix))
        np.testing.assert_array_equal(read_image(path, 12), read_image(path))
        assert bits_if_dark(path.read_bytes(), read_image(path)) == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(8, 16), st.lists(st.integers(0, 65535), min_size=1, max_size=9))
def test_the_rule_keeps_the_order_and_the_ends(bits, samples):
    found = to_eight_bits(np.array(sorted(samples), np.uint16), bits).astype(int)
    assert np.all(np.diff(found) >= 0)
    assert to_eight_bits(np.array([0, 2**bits - 1], np.uint16), bits).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("brightest", "expected"),
    [(4095, 12), (2048, 12), (2047, 11), (200, 8), (255, 8), (0, 8), (16383, 14), (16384, 0), (65535, 0)],
)
def test_dark_ones_are_found(brightest, expected):
    data = encoded(np.full((4, 4), brightest, np.uint16))
    assert bits_if_dark(data, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)) == expected


def test_a_dark_file_is_told_once(tmp_path, caplog):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(twelve_bits()))
        read_image(tmp_path / name)
    (sentence,) = caplog.messages
    assert sentence == (
        f"{tmp_path}/a.png has samples of 16 bits, and is dark: their largest sample takes 12 bits; "
        "--config.data.image_bits=12 keeps the upper 8 of these."
    )
    read_image(tmp_path / "b.png", 12)
    assert len(caplog.messages) == 1


@pytest.fixture
def coco(tmp_path):
    """A data set whose pictures use 12 of 16 bits."""
    directory = tiny.write_coco(tmp_path / "data")
    for split in ("train", "val"):
        edit(directory, lambda content: [i.update(file_name=f"{i['file_name'][:-4]}.png") for i in content["images"]], split)
    for path in directory.rglob("*.jpg"):
        path.with_suffix(".png").write_bytes(encoded(twelve_bits()))
        path.unlink()
    return directory


def test_a_data_set(coco):
    config = tiny.config(coco)
    samples = twelve_bits()[..., ::-1]
    for bits, expected in ((16, samples >> 8), (12, samples >> 4)):
        config.data.image_bits = bits
        for dataset in load_training_data(config):
            for record in dataset.records:
                np.testing.assert_array_equal(read_annotated_image(record.image, 48, 60), expected)
            assert dataset.records[0].image.name.endswith("0.png")
    assert load_dataset(config.data, "val").records.images.names == ["0.png", "1.png", "2.png"]


def test_dark_data_sets_are_told(coco, caplog):
    config = tiny.config(coco)
    check_evaluation_data(load_dataset(config.data, "val"), 1)
    (sentence,) = caplog.messages
    assert sentence == (
        f"3 of 3 images of {coco}/annotations/instances_val2017.json have samples of 16 bits, and are dark: their largest "
        "sample takes 12 bits; --config.data.image_bits=12 keeps the upper 8 of these."
    )
    caplog.clear()
    config.data.image_bits = 12
    check_evaluation_data(load_dataset(config.data, "val"), 1)
    assert not caplog.messages


def test_the_advice_is_for_all_images(coco, caplog):
    """Some of the dark images use fewer bits than others."""
    for number, bits in ((0, 9), (1, 11), (2, 10)):
        (coco / f"val2017/{number}.png").write_bytes(encoded(np.full((48, 60), 2**bits - 1, np.uint16)))
    dataset = load_dataset(tiny.config(coco).data, "val")
    check_evaluation_data(dataset, 1)
    assert "--config.data.image_bits=11 " in caplog.text
    verdict = Verdict()
    verdict.judge_images("val", list(open_images(dataset, 1)))
    assert any("--config.data.image_bits=11 " in doubt for doubt in verdict.doubts)


def test_check_data_doubts_them(coco):
    config = tiny.config(coco)
    opened = list(open_images(load_dataset(config.data, "train"), 1))
    verdict = Verdict()
    verdict.judge_images("train", opened)
    assert any(doubt.startswith("6 of 6 images of the training split have samples of 16 bits") for doubt in verdict.doubts)


@pytest.mark.parametrize("exif", [True, False])
def test_fewer_bits_change_nothing_else_of_an_image(exif):
    whole = SimpleNamespace(name="x.png", exif=exif, bits=16, read=lambda: b"pixels")
    image = ImageOfFewerBits(whole, 12)
    assert (image.name, image.exif, image.bits, image.read()) == ("x.png", exif, 12, b"pixels")
