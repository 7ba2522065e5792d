"""Denoising queries: the layout of their groups, their noise, and the chunks that decide the number of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from hpr_jax.models.queries.denoising import Denoiser
from hpr_jax.ops.boxes import cxcywh_to_xyxy

SIZES = [[50, 60]] * 4


def denoiser(queries=6, views_per_chunk=2, label_noise=0.5):
    return Denoiser(
        tiny.CLASSES,
        8,
        queries=queries,
        label_noise=label_noise,
        box_noise=1.0,
        views_per_chunk=views_per_chunk,
        rngs=nnx.Rngs(0),
    )


def test_groups_of_positives_and_negatives():
    targets = tiny.targets([3, 1, 2, 0], 4, SIZES)
    drawn = denoiser().draw(jax.random.key(0), targets)
    # The views of the first chunk have 3 boxes at most, so 2 groups of 3 + 3; those of the second 2, so 3 groups of 2 + 2.
    assert drawn.used.sum(axis=1).tolist() == [12, 12, 12, 12]
    assert drawn.group[0, :12].tolist() == [0] * 6 + [1] * 6
    assert drawn.group[2, :12].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert drawn.target[0, :6].tolist() == [0, 1, 2, 0, 1, 2]
    assert drawn.positive[0, :6].tolist() == [True] * 3 + [False] * 3
    # The second image has one box: the other slots of its groups are used, but copies of no object.
    assert drawn.object[1, :6].tolist() == [True, False, False, True, False, False]
    assert not drawn.object[3].any()
    assert np.all(np.asarray(drawn.boxes)[~np.asarray(drawn.object)] == 0.5)


def test_slots_suffice_for_more_boxes_than_queries():
    targets = tiny.targets([9, 2], 9, SIZES[:2])
    drawn = denoiser(queries=4).draw(jax.random.key(0), targets)
    assert drawn.used.shape[1] == 18
    assert drawn.used.all()


def test_no_boxes_no_queries():
    drawn = denoiser().draw(jax.random.key(0), tiny.targets([0, 0, 1, 0], 2, SIZES))
    assert not drawn.used[:2].any()
    assert drawn.used[2:].any()


def test_noise_stays_within_its_bounds():
    targets = tiny.targets([2] * 200, 2, [[64, 64]] * 200)
    d = denoiser(queries=20)
    drawn = d.draw(jax.random.key(1), targets)
    boxes = jnp.take_along_axis(targets.boxes, drawn.target[..., None], axis=1)
    moved = np.abs(cxcywh_to_xyxy(drawn.boxes) - cxcywh_to_xyxy(boxes)) / np.tile(boxes[..., 2:], 2)
    inside = np.asarray(jnp.all((cxcywh_to_xyxy(drawn.boxes) > 0.01) & (cxcywh_to_xyxy(drawn.boxes) < 0.99), axis=-1))
    positive = np.asarray(drawn.positive) & inside
    negative = np.asarray(drawn.object & ~drawn.positive) & inside
    # Noise may turn the width or height of a negative copy negative, which is then clipped: such copies are left out.
    assert moved[positive].max() <= 0.5 + 1e-3
    straight = negative & np.asarray(jnp.all(drawn.boxes[..., 2:] > 2e-3, axis=-1))
    assert moved[straight].min() >= 0.5 - 1e-3
    assert moved[straight].max() <= 1.0 + 1e-3
    labels = jnp.take_along_axis(targets.labels, drawn.target, axis=1)
    flipped = np.mean(np.asarray(drawn.labels != labels)[np.asarray(drawn.object)])
    # A quarter is drawn anew, a third of which draws the true label.
    assert abs(flipped - 0.25 * 2 / 3) < 0.02


def test_embedding_is_zero_without_object():
    d = denoiser()
    drawn = d.draw(jax.random.key(0), tiny.targets([2, 1, 0, 0], 2, SIZES))
    content, is_object = np.asarray(d.embed(drawn)), np.asarray(drawn.object)
    assert np.all(content[~is_object] == 0)
    assert np.all(np.abs(content[is_object]).sum(axis=-1) > 0)


def test_both_views_of_an_image_share_a_chunk():
    """A batch has the two views of one image, then those of another; a chunk has two views."""
    targets = tiny.targets([3, 2, 1, 2], 4, SIZES)
    drawn = denoiser().draw(jax.random.key(0), targets, views=2)
    # The views of the first image have 3 boxes at most, so 2 groups of 3 + 3; those of the second 2, so 3 groups of 2 + 2.
    assert drawn.group[:, :12].tolist() == [[0] * 6 + [1] * 6] * 2 + [[0] * 4 + [1] * 4 + [2] * 4] * 2
    # A chunk of four views has both images.
    drawn = denoiser(views_per_chunk=4).draw(jax.random.key(0), targets, views=2)
    assert drawn.group[:, :12].tolist() == [[0] * 6 + [1] * 6] * 4
