"""Denoising queries: the layout of their groups, their noise, and the chunks that decide the number of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.models.queries.denoising import Denoiser
from hpr_jax.ops.boxes import cxcywh_to_xyxy

SIZES = [[50, 60]] * 4


def denoiser(queries=6, views_per_chunk=2, label_noise=0.5, box_noise=1.0):
    return Denoiser(
        tiny.CLASSES,
        8,
        queries=queries,
        label_noise=label_noise,
        box_noise=box_noise,
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


def test_what_does_not_fill_a_group_stays_unused():
    """Seven queries make two groups of three boxes, and three of two."""
    targets = tiny.targets([3, 3, 2, 2], 3, SIZES)
    drawn = denoiser(queries=7).draw(jax.random.key(0), targets)
    assert drawn.used.shape[1] == 14
    assert drawn.used.sum(axis=1).tolist() == [12] * 4
    assert drawn.group[:, 11:].tolist() == [[1, -1, -1]] * 2 + [[2, -1, -1]] * 2


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
    # A chunk holds at least one image with all of its views.
    drawn = denoiser(views_per_chunk=1).draw(jax.random.key(0), targets, views=2)
    assert drawn.group[:, :12].tolist() == [[0] * 6 + [1] * 6] * 2 + [[0] * 4 + [1] * 4 + [2] * 4] * 2


def draw_copies(box, **settings):
    """Noisy copies of one box of class 0, many of them: boxes, labels, and whether they are positive."""
    targets = tiny.targets([2] * 50, 2, [[64, 64]] * 50)
    targets = targets.replace(
        boxes=jnp.broadcast_to(jnp.array(box), targets.boxes.shape), labels=jnp.zeros_like(targets.labels)
    )
    drawn = jax.jit(lambda denoiser: denoiser.draw(jax.random.key(0), targets))(denoiser(queries=20, **settings))
    assert np.all(drawn.object)
    return (np.asarray(array).reshape(2000, *array.shape[2:]) for array in (drawn.boxes, drawn.labels, drawn.positive))


def test_without_noise_queries_are_copies():
    boxes, labels, _ = draw_copies((0.5, 0.6, 0.1, 0.2), label_noise=0.0, box_noise=0.0)
    np.testing.assert_allclose(boxes, np.tile([0.5, 0.6, 0.1, 0.2], (2000, 1)), rtol=1e-4)
    assert not labels.any()


def test_noise_is_a_share_of_the_box():
    """With the noise 0.5, negatives move each corner by a quarter to a half of the box's sides, positives by less."""
    boxes, labels, positive = draw_copies((0.5, 0.4, 0.4, 0.2), label_noise=1.0, box_noise=0.5)
    # A box moves by the mean of its corners' moves, and grows by their difference: the larger of the two says how far the
    # corners went on average.
    center = np.abs(boxes[:, :2] - [0.5, 0.4]) / [0.4, 0.2]
    growth = np.abs(boxes[:, 2:] - [0.4, 0.2]) / [0.4, 0.2] / 2
    moved = np.maximum(center, growth)
    for kind, low, high in ((positive, 0.0, 0.25), (~positive, 0.25, 0.5)):
        assert low - 1e-4 < moved[kind].min() < low + 0.02
        assert high - 0.02 < moved[kind].max() < high + 1e-4
    # Half of the labels are drawn anew, a third of which are the true ones.
    assert abs(np.mean(labels > 0) - 0.5 * 2 / 3) < 0.05


def test_boxes_end_at_the_border_of_the_image():
    """A corner that leaves the image stays at 0 or 1, and sides are told from 0 and 1 down to a thousandth."""
    boxes, _, positive = draw_copies((0.5, 0.5, 1.0, 1.0))
    whole = positive & (boxes[:, 2] > 0.9985)
    # Both corners leave in a quarter of all cases.
    assert abs(whole[positive].mean() - 0.25) < 0.05
    np.testing.assert_allclose(boxes[whole][:, [0, 2]], np.tile([0.5, 1 / 1.001], (whole.sum(), 1)), rtol=1e-5)
    # The corners of negatives may pass one another.
    assert boxes[~positive, 2].min() == pytest.approx(0.001 / 1.001, rel=1e-5)
