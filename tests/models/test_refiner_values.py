"""The refiner's merges, boxes, selection and heads against values by hand, with stubs in place of the parts around them."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stubs import floats, pyramid, stub

from hpr_jax.models.heads import DecoderHeads, PredictionHead
from hpr_jax.models.refiner.hybrid import DecoderInput, HybridRefiner, RegionSettings
from hpr_jax.models.refiner.interaction import SharedSettings
from hpr_jax.models.refiner.layer import RefinerLayer, RefinerPath
from hpr_jax.models.refiner.nms_selection import select_distinct
from hpr_jax.models.refiner.point import PointInteraction

SHARED = SharedSettings(channels=8, heads=2, levels=2, points=1, region_size=2)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p, np.float64))


class StubPath:
    """A path whose parts are numbers: `attention` is added, all others multiply."""

    def __init__(self, attention, interaction, ffn, norms):
        self.attention = stub(self_attention=lambda query, position, mask: attention)
        self.interaction = lambda query, position, surroundings: interaction * query
        self.ffn = lambda query: ffn * query
        self.norm1, self.norm2, self.norm3 = (lambda x, by=by: by * x for by in norms)

    attend, interact, feed_forward = RefinerPath.attend, RefinerPath.interact, RefinerPath.feed_forward


def refine(**merges):
    """What a layer of three such paths computes from the query 1: the refined query, and the branches."""
    paths = StubPath(10, 1, 1, (2, 3, 5)), StubPath(20, 1, 2, (3, 5, 2)), StubPath(30, 2, 1, (5, 2, 3))
    none = dict.fromkeys(("merge_attention", "merge_interaction", "merge_ffn"))
    layer = stub(primary=paths[0], auxiliaries=paths[1:], **{**none, **merges})
    layer.attended = functools.partial(RefinerLayer.attended, layer)
    layer._by_path = functools.partial(RefinerLayer._by_path, layer)
    # In float64, which holds all the numbers exactly.
    ones: Any = np.ones((1, 1, 1))
    refined, branches = RefinerLayer.__call__(layer, ones, ones, None, stub())
    return refined.item(), branches[:, 0, 0, 0].tolist()


def weighted(xs):
    """A merge with the weights 1, 1000 and 1000 squared, whose sum shows the paths, their number and their order."""
    return sum(x * 1000**i for i, x in enumerate(xs))


class TestMerges:
    # Attention makes 1 + 20 and 1 + 30 of the query, the FFN or the interaction doubles that, and the norms multiply by 30.
    BRANCHES = (21 * 2 * 30, 31 * 2 * 30)

    def test_without_merges_every_path_is_alone(self):
        assert refine() == (11 * 30, [*self.BRANCHES])

    def test_behind_the_attention(self):
        """The merge includes the residual; the primary path alone goes on with it."""
        assert refine(merge_attention=weighted) == (31_021_011 * 30, [*self.BRANCHES])

    def test_behind_the_interaction(self):
        merged = 11 * 2 + (21 * 3) * 1000 + (31 * 5 * 2) * 1000**2
        assert refine(merge_interaction=weighted) == (merged * 3 * 5, [*self.BRANCHES])

    def test_behind_the_ffn(self):
        """The merge is in front of the last norm."""
        merged = 11 * 2 * 3 + (21 * 3 * 5 * 2) * 1000 + (31 * 5 * 2 * 2) * 1000**2
        assert refine(merge_ffn=weighted) == (merged * 5, [*self.BRANCHES])

    @pytest.mark.parametrize("points", [("attention", "ffn"), ("interaction",)])
    def test_settings_say_where(self, points):
        def make():
            settings: dict[str, Any] = {"merge": "fixed", "merge_initial": (), "merge_points": points, "rngs": nnx.Rngs(0)}
            return RefinerLayer(make_point, [make_point], 8, 2, 8, **settings)

        layer = nnx.eval_shape(make)
        for point in ("attention", "interaction", "ffn"):
            assert (getattr(layer, f"merge_{point}") is not None) == (point in points), point


def make_point(rngs):
    return PointInteraction(SHARED, rngs=rngs)


@flax.struct.dataclass
class StubLayers:
    """Layers that return given queries `[layers, Q, C]`, and as branches what they were given: the mask and the positions.
    There must be as many queries as channels."""

    content: jax.Array
    primary = stub(interaction=stub(needs_regions=False))
    auxiliaries = ()

    def __call__(self, query, position, mask, surroundings):
        return self.content[None], jnp.stack([mask.astype(jnp.float32), position])


@flax.struct.dataclass
class StubHeads:
    """Heads whose logits are the first two of four channels; their offsets are the other two, twice, plus a `shift`
    `[layers, 4]`."""

    shift: jax.Array

    def offsets(self, x, num_dense):
        return jnp.tile(x[..., 2:], 2) + self.shift

    def logits(self, x):
        return x[..., :2]

    @property
    def matching(self):
        return self


def decode(boxes, content, shift, *, num_denoising=0, nms_threshold=None, refine_epsilon=1e-3, position=None):
    """Runs a refiner of stubs on four queries of four channels, all of which may see all. With a `position` it does not
    encode the boxes."""
    # The positions are the sines of the lowest frequency: of 2 pi times y, x, width and height.
    stubs = stub(
        layers=StubLayers(jnp.asarray(content, jnp.float32)),
        position=(lambda encoding: encoding[..., ::2]) if position is None else None,
        refine_epsilon=refine_epsilon,
        nms_threshold=nms_threshold,
        implementation=None,
        remat=False,
    )
    stubs.mask_of = functools.partial(HybridRefiner.mask_of, stubs)
    stubs.position_of = functools.partial(HybridRefiner.position_of, stubs)
    heads: Any = StubHeads(shift)
    matching = 4 - num_denoising
    queries = DecoderInput(
        jnp.zeros((1, 4, 4)),
        boxes[None],
        jnp.ones((1, 4, 4), bool),
        jnp.zeros((1, matching), bool),
        num_denoising,
        matching,
        0,
        position,
    )
    return HybridRefiner.__call__(stubs, queries, stub(), heads)


class TestReferenceBoxes:
    """There are two layers."""

    # The third coordinate is below what the inverse sigmoid distinguishes, the fourth above.
    BOXES = np.tile(floats([0.5, 0.25, 1e-4, 1.0]), (4, 1))
    CONTENT = np.arange(32, dtype=np.float32).reshape(2, 4, 4) / 16
    SHIFT = floats([[0.1, 0.2, 0.3, 0.4], [-0.1, -0.2, -0.3, -0.4]])

    def expected(self):
        boxes = [self.BOXES.astype(np.float64)]
        for content, shift in zip(self.CONTENT, self.SHIFT):
            guarded = np.log(np.maximum(boxes[-1], 1e-3) / np.maximum(1 - boxes[-1], 1e-3))
            boxes.append(sigmoid(guarded + np.tile(content[:, 2:], 2) + shift))
        return np.stack(boxes)

    def test_boxes_move_by_what_the_heads_see_in_queries_without_norm(self):
        out = jax.jit(decode)(self.BOXES, self.CONTENT, self.SHIFT)
        np.testing.assert_allclose(out.reference_boxes[:, 0], self.expected(), rtol=1e-5)
        np.testing.assert_array_equal(out.hidden[:, 0], self.CONTENT)
        assert out.selected.shape == (2, 1, 4)
        assert np.all(out.selected)
        # Each layer gets the encoding of the boxes in front of it, y before x.
        y_first = self.expected()[:2][..., [1, 0, 2, 3]]
        np.testing.assert_allclose(out.branches[:, 1, 0], np.sin(2 * np.pi * y_first), atol=1e-5)

    def test_a_given_position_is_that_of_every_layer(self):
        position = floats(np.arange(16).reshape(1, 4, 4))
        out = jax.jit(decode)(self.BOXES, self.CONTENT, self.SHIFT, position=position)
        np.testing.assert_array_equal(out.branches[:, 1], np.stack([position] * 2))

    def test_a_smaller_epsilon_moves_small_boxes(self):
        """The width of 1e-4 is no longer taken for 1e-3."""
        out = jax.jit(functools.partial(decode, refine_epsilon=1e-5))(self.BOXES, 0 * self.CONTENT, 0 * self.SHIFT)
        np.testing.assert_allclose(out.reference_boxes[1, 0, :, 2], [1e-4] * 4, rtol=1e-3)

    def test_gradients_reach_back_one_layer(self):
        """The box behind a layer depends on that layer's head, but no gradient reaches the layers before."""

        @jax.jit
        @functools.partial(jax.jacrev, argnums=(0, 2))
        def gradients(boxes, content, shift):
            return jnp.sum(decode(boxes, content, shift).reference_boxes, axis=(1, 2, 3))

        of_boxes, of_shift = gradients(self.BOXES, self.CONTENT, self.SHIFT)
        assert not np.any(of_boxes)
        expected = self.expected()
        slope = np.sum(expected * (1 - expected), axis=1)
        nothing = np.zeros(4)
        by_hand = [[nothing, nothing], [slope[1], nothing], [nothing, slope[2]]]
        np.testing.assert_allclose(of_shift, by_hand, rtol=1e-4, atol=1e-6)


class TestSelection:
    """There are a denoising query and three matching ones, the first two of which have the same box. In front of layer 0 all
    are selected."""

    BOXES = floats([[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.2, 0.8, 0.2, 0.2]])

    def test_layers(self):
        scores = np.zeros((3, 4, 4), np.float32)
        # Behind layer 0 the second matching query is better, by its better class. Behind layer 1 the first one is better,
        # but it is no longer selected.
        scores[0, 1:, :2] = [[0.5, 0.5], [0.1, 0.9], [0.2, 0.2]]
        scores[1, 1:, :2] = [[0.9, 0.9], [0.1, 0.2], [0.0, 0.0]]
        decoded = jax.jit(functools.partial(decode, num_denoising=1, nms_threshold=0.8))
        out = decoded(self.BOXES, scores, np.zeros((3, 4), np.float32))
        assert out.selected[:, 0].tolist() == [[True, True, True], [False, True, True], [False, True, True]]
        everything = [[1, 1, 1, 1]] * 4
        # The query that is not selected sees the selected ones and the denoising one, but not itself.
        removed = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
        assert out.branches[:, 0, 0].tolist() == [everything, removed, removed]

    @pytest.mark.parametrize(
        ("selected", "expected"),
        [
            # If the first query is selected, one that is not may come back, and suppress.
            ([True, False, True], [False, True, True]),
            ([False, False, True], [False, False, True]),
            ([False, True, True], [False, True, True]),
        ],
    )
    def test_valid_queries_alone_are_selected(self, selected, expected):
        scores, duplicates = floats([0.1, 0.9, 0.5]), np.zeros(3, bool)
        found = select_jitted(scores, self.BOXES[1:], np.array(selected), duplicates)
        assert found.tolist() == expected


select_jitted = jax.jit(functools.partial(select_distinct, threshold=0.8))


def test_regions_are_taken_at_the_boxes_of_the_valid_image():
    """The features of the map are x and y; it comes from an image 32 high and 64 wide, at stride 8."""
    ramp = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), axis=-1).reshape(64, 2).astype(np.float32)
    memory = pyramid(ramp, ((8, 8),), [(4, 8)], image_size=(32, 64))
    refiner = stub(region=RegionSettings(strides=(8,), output_size=2, sampling_ratio=1), implementation=None)
    regions = jax.jit(functools.partial(HybridRefiner.regions, refiner))(memory, floats([[[0.25, 0.5, 0.25, 0.5]]]))
    # The box spans the pixels 8 to 24 in x and in y; the middles of its quarters are 12 and 20.
    np.testing.assert_allclose(regions[0, 0], [[1, 1], [2, 1], [1, 2], [2, 2]], atol=1e-6)


class TestDecoderHeads:
    """Box heads return a constant shift, and class heads a constant logit."""

    REFERENCES = floats([[[[1e-4, 0.25, 0.5, 0.9]] * 3], [[[0.5, 0.5, 0.5, 0.5]] * 3]])
    HIDDEN = np.zeros((2, 1, 3, 4), np.float32)

    @staticmethod
    @functools.cache
    def heads():
        """Heads of two layers. The shifts are 1 and 2 for matching queries, and 3 and 4 for dense ones."""
        heads = nnx.eval_shape(lambda: DecoderHeads(PredictionHead(4, 1, rngs=nnx.Rngs(0)), 2, with_dense=True))
        heads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), heads)
        for part, shifts in ((heads.matching, (1.0, 2.0)), (heads.dense, (3.0, 4.0))):
            part.boxes.layers[-1].bias = nnx.Param(jnp.repeat(jnp.array(shifts)[:, None], 4, axis=1))
            part.classes.bias = nnx.Param(10 * jnp.array(shifts)[:, None])
        return heads

    def test_boxes_start_from_the_references(self):
        """References count as at least 1e-5 away from 0 and 1. The last query is dense."""
        logits, boxes = jax.jit(DecoderHeads.predict, static_argnums=3)(self.heads(), self.HIDDEN, self.REFERENCES, 1)
        shifts = np.array([[1, 1, 3], [2, 2, 4]], np.float32)
        np.testing.assert_array_equal(logits[:, 0, :, 0], 10 * shifts)
        np.testing.assert_allclose(boxes, sigmoid(logit(self.REFERENCES) + shifts[:, None, :, None]), rtol=1e-5)

    def test_without_dense_queries_all_are_matching(self):
        logits, boxes = jax.jit(DecoderHeads.predict, static_argnums=3)(self.heads(), self.HIDDEN, self.REFERENCES, 0)
        np.testing.assert_array_equal(logits[:, 0, :, 0], [[10] * 3, [20] * 3])
        assert boxes[1, 0, :, 0] == pytest.approx([sigmoid(2)] * 3)

    def test_gradients_flow_into_the_references(self):
        @jax.jit
        @jax.grad
        def gradient(references):
            return jnp.sum(self.heads().predict(self.HIDDEN, references, 1)[1])

        # The slope of the sigmoid at the box, over that at the reference.
        out = sigmoid(logit(0.25) + 1)
        assert gradient(self.REFERENCES)[0, 0, 0, 1] == pytest.approx(out * (1 - out) / (0.25 * 0.75), rel=1e-4)
