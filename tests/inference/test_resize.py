"""The resize of exported programs, against OpenCV's."""

import cv2
import numpy as np
import pytest

from hpr_jax.inference.resize import resize


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((48, 60), (51, 64)),
        ((60, 48), (64, 51)),
        ((90, 120), (48, 64)),
        ((96, 128), (48, 64)),
        ((96, 64), (48, 64)),
        ((48, 64), (48, 64)),
        ((1, 1), (7, 5)),
        ((9, 1), (3, 4)),
        ((1, 9), (4, 2)),
        ((37, 53), (111, 20)),
    ],
)
def test_every_bit_is_as_opencv_has_it(old, new):
    images = np.random.default_rng(0).integers(0, 256, (2, *old, 3)).astype(np.uint8)
    expected = [cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR).reshape(*new, 3) for image in images]
    np.testing.assert_array_equal(resize(images, new), expected)
