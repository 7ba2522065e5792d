"""Proposals: which tokens have an anchor inside of the image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hpr_jax.models.pyramid import Pyramid, join_levels
from hpr_jax.models.queries.proposals import ProposalGenerator, anchors_inside


def pyramid(level_sizes, spatial_shapes):
    """Zero tokens `[B, S, 2]` of levels with the valid sizes `[B, L, 2]`."""
    level_sizes = jnp.asarray(level_sizes, jnp.int32)
    batch, tokens = len(level_sizes), sum(height * width for height, width in spatial_shapes)
    return Pyramid(
        tokens=join_levels([jnp.zeros((batch, tokens, 2))]),
        valid=join_levels([jnp.ones((batch, tokens), bool)]),
        level_sizes=level_sizes,
        image_sizes=8 * level_sizes[:, 0],
        spatial_shapes=tuple(spatial_shapes),
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_border_is_the_official_one_at_every_size(axis):
    # The official rule divides in float32 and compares with 0.01 and 0.99 in float32.
    length = 1400
    sizes = np.arange(1, length + 1)
    centers = (np.arange(length, dtype=np.float32) + np.float32(0.5)) / sizes[:, None].astype(np.float32)
    official = (centers > np.float32(0.01)) & (centers < np.float32(0.99))
    level_sizes, shape = np.ones((length, 1, 2), np.int32), [1, 1]
    level_sizes[:, 0, axis], shape[axis] = sizes, length
    ours = jax.jit(anchors_inside)(pyramid(level_sizes, [tuple(shape)]))[..., 0]
    valid = np.arange(length) < sizes[:, None]
    np.testing.assert_array_equal(np.asarray(ours) & valid, official & valid)


def test_the_last_of_50_rows_and_the_third_of_250_are_outside():
    # 49.5 / 50 = 0.99 and 2.5 / 250 = 0.01: neither lies between the two.
    rows = anchors_inside(pyramid([[[50, 1]]], [(50, 1)]))[0, :, 0]
    assert np.flatnonzero(rows).tolist() == list(range(1, 49))
    columns = anchors_inside(pyramid([[[1, 250]]], [(1, 250)]))[0, :, 0]
    assert np.flatnonzero(columns).tolist() == list(range(3, 247))


def test_sides_of_anchors_count_from_the_sixth_level_on():
    # 0.05 * 2 ** 4 = 0.8 lies inside, 1.6 does not.
    shapes = [(3, 3)] * 6
    inside = np.asarray(anchors_inside(pyramid([[[3, 3]] * 6], shapes)))[0, :54, 0].reshape(6, 9)
    assert inside.all(axis=1).tolist() == [True] * 5 + [False]
    assert not inside[5].any()


def test_tokens_outside_have_infinite_anchors_and_others_the_logits_of_theirs():
    # One row of two tokens in an image whose second column is padding.
    memory = pyramid([[[1, 1]]], [(1, 2)])
    tokens = ProposalGenerator.tokens(dataclasses.replace(memory, valid=join_levels([jnp.array([[True, False]])])))
    assert tokens.inside[0, :2, 0].tolist() == [True, False]
    np.testing.assert_allclose(tokens.anchors[0, 0], [0, 0, np.log(0.05 / 0.95), np.log(0.05 / 0.95)], rtol=1e-5)
    assert np.isposinf(tokens.anchors[0, 1]).all()
