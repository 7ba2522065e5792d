"""Parts of a batch, on each of several devices."""

import numpy as np
import pytest

from hpr_jax.training.parts import join_parts, part_of, take_part


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_all_devices(devices, parts, axis):
    """A part has the part of each device; all of them joined are the whole, from which each can be taken again."""
    whole = np.moveaxis(np.arange(24 * 2).reshape(24, 2), 0, axis)
    by_device = np.split(whole, devices, axis)
    of_all = [np.concatenate([part_of(x, part, parts, axis) for x in by_device], axis) for part in range(parts)]
    np.testing.assert_array_equal(join_parts(of_all, devices, axis), whole)
    for part, expected in enumerate(of_all):
        np.testing.assert_array_equal(take_part(whole, part, parts, devices, axis), expected)
