"""Parts of the refiner against values computed by hand, with stubs in place of the parts around them."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stubs import floats, pyramid, stub

from hpr_jax.models.attention import DeformableAttention, MultiHeadAttention
from hpr_jax.models.heads import DecoderHeads, PredictionHead
from hpr_jax.models.position import map_encoding
from hpr_jax.models.refiner.dynamic_conv import DynamicConv
from hpr_jax.models.refiner.global_attention import GlobalAttention
from hpr_jax.models.refiner.hybrid import DecoderInput, HybridRefiner, RegionSettings
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings
from hpr_jax.models.refiner.layer import RefinerLayer
from hpr_jax.models.refiner.nms_selection import select_distinct
from hpr_jax.models.refiner.point import PointInteraction
from hpr_jax.models.refiner.region_fc import RegionFC
from hpr_jax.models.refiner.regional_attention import RegionalAttention

RNG = np.random.default_rng(0)
SHARED = SharedSettings(channels=8, heads=2, levels=2, points=1, region_size=2)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p, np.float64))


def normed(x):
    """Mean 0 and variance 1 over the channels."""
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def relu(x):
    return np.maximum(x, 0)


def array(*shape: int) -> Any:
    """Random numbers."""
    return RNG.normal(size=shape).astype(np.float32)


class StubPath:
    """A path whose parts are numbers: `attention` is added, all others multiply."""

    def __init__(self, attention, interaction, ffn, norms):
        self.attention = stub(self_attention=lambda query, position, mask: attention)
        self.interaction = lambda query, position, surroundings: interaction * query
        self.ffn = lambda query: ffn * query
        self.norm1, self.norm2, self.norm3 = (lambda x, by=by: by * x for by in norms)


def refine(**merges):
    """What a layer of three such paths computes from the query 1: the refined query, and the branches."""
    paths = StubPath(10, 1, 1, (2, 3, 5)), StubPath(20, 1, 2, (3, 5, 2)), StubPath(30, 2, 1, (5, 2, 3))
    none = dict.fromkeys(("merge_attention", "merge_interaction", "merge_ffn"))
    layer = stub(primary=paths[0], auxiliaries=paths[1:], **{**none, **merges})
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


def decode(boxes, content, shift, *, num_denoising=0, nms_threshold=None):
    """Runs a refiner of stubs on four queries of four channels, all of which may see all."""
    # The positions are the sines of the lowest frequency: of 2 pi times y, x, width and height.
    stubs = stub(
        layers=StubLayers(jnp.asarray(content, jnp.float32)),
        position=lambda encoding: encoding[..., ::2],
        nms_threshold=nms_threshold,
        remat=False,
    )
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
    refiner = stub(region=RegionSettings(strides=(8,), output_size=2, sampling_ratio=1))
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


def softmax_attention(query, key, value, heads, seen=True):
    """Attention of queries `[Q, C]` to keys and values `[K, C]`, of which `seen` bool `[Q, K]` may be seen."""
    out = []
    for q, k, v in zip(*(np.split(x, heads, axis=-1) for x in (query, key, value))):
        weights = np.exp(q @ k.T / np.sqrt(q.shape[-1])) * seen
        out.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    return np.concatenate(out, axis=-1)


class StubAttention:
    """Multi-head attention with given kernels and biases."""

    self_attention: Any = MultiHeadAttention.self_attention
    attend: Any = MultiHeadAttention.attend
    project: Any = MultiHeadAttention.project

    def __init__(self, channels, heads):
        self.kernel, self.bias, self.out = array(channels, 3 * channels), array(3 * channels), array(channels, channels)
        self.heads = heads

    def input(self, x, columns):
        return x @ self.kernel[:, columns] + self.bias[columns]

    def output(self, x):
        return x @ self.out

    def projected(self, query, key, value):
        """The projections of `[Q, C]`, `[K, C]` and `[K, C]`, by NumPy."""
        parts = np.split(self.kernel, 3, axis=1), np.split(self.bias, 3)
        return [x @ kernel + bias for x, kernel, bias in zip((query, key, value), *parts)]


def test_positions_are_in_queries_and_keys_alone():
    attention, x, position = StubAttention(4, 2), array(1, 3, 4), array(1, 3, 4)
    seen = np.array([[True, False, True], [True, True, True], [False, True, False]])
    out = jax.jit(attention.self_attention)(x, position, seen[None])
    there = x[0] + position[0]
    query, key, value = attention.projected(there, there, x[0])
    expected = softmax_attention(query, key, value, 2, seen) @ attention.out
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5)


class TestDeformableAttention:
    """The values of the maps are their x and y coordinates, so that the result is the mean place that is sampled."""

    @staticmethod
    def attend(reference, offsets, *, weights=0.0, bias=0.0, sizes=(8, 8), valid=True, levels=1):
        shape = (1, 1, 1, levels, 2, 2)
        ramp = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), axis=-1).reshape(64, 2).astype(np.float32)
        attention = stub(
            value=lambda memory: memory + bias,
            offsets=lambda x: jnp.broadcast_to(jnp.array(offsets, jnp.float32), shape).reshape(1, 1, -1),
            weights=lambda x: jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (1, 1, 2 * levels)),
            output=lambda x: 10 * x,
            heads=1,
            levels=levels,
            points=2,
            implementation="xla",
        )
        tokens = np.concatenate([ramp + 100 * level for level in range(levels)])
        memory = pyramid(tokens, ((8, 8),) * levels, [sizes] * levels, valid=np.full(len(tokens), valid))

        @jax.jit
        def run(query, memory, reference):
            return DeformableAttention.__call__(attention, query, jnp.zeros((1, 1, 2)), memory, reference)

        out = run(np.ones((1, 1, 2), np.float32), memory, floats([[reference]]))
        # Without the residual, 1, and the output projection, 10.
        return (out[0, 0] - 1) / 10

    def test_offsets_from_points_are_pixels(self):
        """Half of 8 pixels is 4, which is at 3.5 if the centre of the first pixel is at 0."""
        np.testing.assert_allclose(self.attend((0.5, 0.25), (2.0, 1.0)), [3.5 + 2, 1.5 + 1], rtol=1e-5)

    def test_offsets_from_boxes_are_half_sides_over_the_number_of_points(self):
        """With a box 4 pixels wide and 2 high, and two points, the unit of offsets is 4 / 2 / 2 and 2 / 2 / 2 pixels."""
        np.testing.assert_allclose(self.attend((0.5, 0.5, 0.5, 0.25), (2.0, -3.0)), [3.5 + 2, 3.5 - 1.5], rtol=1e-5)

    def test_references_are_relative_to_the_valid_area(self):
        """The valid area is 6 high and 4 wide."""
        np.testing.assert_allclose(self.attend((0.5, 0.5), (1.0, 1.0), sizes=(6, 4)), [1.5 + 1, 2.5 + 1], rtol=1e-5)
        box = self.attend((0.5, 0.5, 0.5, 0.5), (1.0, 1.0), sizes=(6, 4))
        np.testing.assert_allclose(box, [1.5 + 0.5, 2.5 + 0.75], rtol=1e-5)

    def test_weights_sum_to_one_over_all_levels_and_points(self):
        """There are two points on each of two levels; the values of the second level are larger by 100."""
        weights = np.log([0.1, 0.2, 0.3, 0.4])
        out = self.attend((0.5, 0.5), (0.0, 0.0), weights=weights, levels=2)
        np.testing.assert_allclose(out, [3.5 + 70, 3.5 + 70], rtol=1e-5)

    def test_padding_is_masked_behind_the_projection(self):
        """Otherwise the projection's bias would be sampled there."""
        np.testing.assert_array_equal(self.attend((0.5, 0.5), (0.0, 0.0), bias=7.0, valid=False), [0, 0])


def filled(make: Any) -> Any:
    """A module with random weights."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(array(*leaf.shape)), state))


def linear(module, x):
    return x @ np.asarray(module.kernel) + np.asarray(module.bias)


def norm(module, x):
    return normed(x) * np.asarray(module.scale) + np.asarray(module.bias)


# Not the default.
TEMPERATURE = 7.0


def encoded(height, width):
    """The encodings of positions in a map whose valid area is 2 x 2."""
    encode = jax.jit(functools.partial(map_encoding, height=height, width=width, channels=8, temperature=TEMPERATURE))
    return np.asarray(encode(np.full((1, 2), 2)))


class TestInteractions:
    """Two queries of eight channels, with regions of 2 x 2."""

    QUERY, POSITION = array(1, 2, 8), array(1, 2, 8)
    REGIONS = array(1, 2, 4, 8)

    def interact(self, module, memory=None):
        @jax.jit
        def run(module, query, position, regions, memory):
            return module(query, position, Surroundings(memory, jnp.zeros((1, 2, 4)), regions))

        return np.asarray(run(module, self.QUERY, self.POSITION, self.REGIONS, memory))[0]

    def test_dynamic_convolution(self):
        module = filled(lambda rngs: DynamicConv(SHARED, hidden=3, rngs=rngs))
        generated = linear(module.generator, self.QUERY[0])
        for out, query, region, kernels in zip(self.interact(module), self.QUERY[0], self.REGIONS[0], generated):
            x = relu(norm(module.norm1, region @ kernels[:24].reshape(8, 3)))
            x = relu(norm(module.norm2, x @ kernels[24:].reshape(3, 8)))
            expected = query + relu(norm(module.norm3, linear(module.project, x.ravel())))
            np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)

    def test_regional_attention(self):
        """Keys contain encodings of positions within the region; queries and values do not."""
        module = filled(lambda rngs: RegionalAttention(SHARED, heads=2, samples=3, temperature=TEMPERATURE, rngs=rngs))
        encoding = encoded(2, 2).reshape(4, 8)
        parts = (
            np.split(np.asarray(module.attention.input.kernel), 3, axis=1),
            np.split(np.asarray(module.attention.input.bias), 3),
        )
        spawned = linear(module.spawn, self.QUERY[0]).reshape(2, 3, 8)
        for out, query, region, samples in zip(self.interact(module), self.QUERY[0], self.REGIONS[0], spawned):
            q, k, v = (x @ kernel + bias for x, kernel, bias in zip((samples, region + encoding, region), *parts))
            x = linear(module.attention.output, softmax_attention(q, k, v, 2))
            expected = query + relu(norm(module.norm, linear(module.project, x.ravel())))
            np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)

    def test_global_attention(self):
        """It reads the second of two levels, without its padding. Keys contain encodings of positions; values do not."""
        module = filled(lambda rngs: GlobalAttention(SHARED, heads=2, level=1, temperature=TEMPERATURE, rngs=rngs))
        valid = np.array([True] * 4 + [True, True, False] * 2)
        memory = pyramid(array(10, 8), ((2, 2), (2, 3)), [(2, 2), (2, 2)], valid=valid)
        encoding = encoded(2, 3).reshape(6, 8)[valid[4:]]
        tokens = np.asarray(memory.tokens)[0, 4:][valid[4:]]
        parts = (
            np.split(np.asarray(module.attention.input.kernel), 3, axis=1),
            np.split(np.asarray(module.attention.input.bias), 3),
        )
        inputs = self.QUERY[0] + self.POSITION[0], tokens + encoding, tokens
        q, k, v = (x @ kernel + bias for x, kernel, bias in zip(inputs, *parts))
        expected = self.QUERY[0] + linear(module.attention.output, softmax_attention(q, k, v, 2))
        np.testing.assert_allclose(self.interact(module, memory), expected, rtol=1e-3, atol=1e-3)

    def test_point(self):
        module = filled(lambda rngs: PointInteraction(SHARED, rngs=rngs))
        expected = self.QUERY[0] + relu(norm(module.norm, linear(module.project, self.QUERY[0])))
        np.testing.assert_allclose(self.interact(module), expected, rtol=1e-4, atol=1e-4)

    def test_fully_connected_layers(self):
        """The result does not depend on the query."""
        module = filled(lambda rngs: RegionFC(SHARED, hidden=5, rngs=rngs))
        expected = relu(linear(module.contract, relu(linear(module.expand, self.REGIONS[0].reshape(2, 32)))))
        np.testing.assert_allclose(self.interact(module), expected, rtol=1e-4, atol=1e-4)
