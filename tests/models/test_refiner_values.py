"""Parts of the refiner against values worked out by hand, with stubs in place of their neighbours."""

import functools
import types

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interactions import shared

from hpr_jax.models.attention import DeformableAttention, MultiHeadAttention
from hpr_jax.models.heads import DecoderHeads, PredictionHead
from hpr_jax.models.position import map_encoding
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.models.refiner.dynamic_conv import DynamicConv
from hpr_jax.models.refiner.global_attention import GlobalAttention
from hpr_jax.models.refiner.hybrid import DecoderInput, HybridRefiner, RegionSettings
from hpr_jax.models.refiner.interaction import Surroundings
from hpr_jax.models.refiner.layer import RefinerLayer
from hpr_jax.models.refiner.point import PointInteraction
from hpr_jax.models.refiner.region_fc import RegionFC
from hpr_jax.models.refiner.regional_attention import RegionalAttention
from hpr_jax.models.refiner.selection import select_distinct

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p, np.float64))


def normed(x):
    """Mean 0 and variance 1 over the channels."""
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def relu(x):
    return np.maximum(x, 0)


def array(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def pyramid(tokens, shapes, sizes, image_size=(64, 64), valid=None):
    """Of one image: tokens `[S, C]`, valid (height, width) of each level."""
    valid = np.ones(len(tokens), bool) if valid is None else valid
    as_batch = (np.asarray(x)[None] for x in (tokens, valid, sizes, image_size))
    return Pyramid(*as_batch, spatial_shapes=shapes)


class StubPath:
    """Numbers in place of a path's parts: `attention` is added, all others multiply."""

    def __init__(self, attention, interaction, ffn, norms):
        self.attention = types.SimpleNamespace(self_attention=lambda query, position, mask: attention)
        self.interaction = lambda query, position, surroundings: interaction * query
        self.ffn = lambda query: ffn * query
        self.norm1, self.norm2, self.norm3 = (lambda x, by=by: by * x for by in norms)


def refine(**merges):
    """What a layer of three such paths makes of the query 1: the refined query, and the branches."""
    paths = StubPath(10, 1, 1, (2, 3, 5)), StubPath(20, 1, 2, (3, 5, 2)), StubPath(30, 2, 1, (5, 2, 3))
    none = dict.fromkeys(("merge_attention", "merge_interaction", "merge_ffn"))
    layer = types.SimpleNamespace(primary=paths[0], auxiliaries=paths[1:], **{**none, **merges})
    refined, branches = RefinerLayer.__call__(layer, np.ones((1, 1, 1)), None, None, None)
    return refined.item(), branches[:, 0, 0, 0].tolist()


def weighted(xs):
    """A merge with the weights 1, 1000 and 1000 squared: the sum shows the paths, their number and their order."""
    return sum(x * 1000**i for i, x in enumerate(xs))


class TestMerges:
    # 1 + 20 and 1 + 30, times 2 in the FFN or the interaction; the norms of each path multiply to 30.
    BRANCHES = (21 * 2 * 30, 31 * 2 * 30)

    def test_without_merges_every_path_is_alone(self):
        assert refine() == (11 * 30, [*self.BRANCHES])

    def test_behind_the_attention(self):
        """With the residual; the primary path alone goes on with the merge."""
        assert refine(merge_attention=weighted) == (31_021_011 * 30, [*self.BRANCHES])

    def test_behind_the_interaction(self):
        merged = 11 * 2 + (21 * 3) * 1000 + (31 * 5 * 2) * 1000**2
        assert refine(merge_interaction=weighted) == (merged * 3 * 5, [*self.BRANCHES])

    def test_behind_the_ffn(self):
        """In front of the last norm."""
        merged = 11 * 2 * 3 + (21 * 3 * 5 * 2) * 1000 + (31 * 5 * 2 * 2) * 1000**2
        assert refine(merge_ffn=weighted) == (merged * 5, [*self.BRANCHES])

    @pytest.mark.parametrize("points", [("attention", "ffn"), ("interaction",)])
    def test_settings_say_where(self, points):
        def make():
            settings = {"merge": "fixed", "merge_initial": (), "merge_points": points, "rngs": nnx.Rngs(0)}
            return RefinerLayer(point_refiner, [point_refiner], 4, 2, 8, **settings)

        layer = nnx.eval_shape(make)
        for point in ("attention", "interaction", "ffn"):
            assert (getattr(layer, f"merge_{point}") is not None) == (point in points), point


def point_refiner(rngs):
    return PointInteraction(shared(4), rngs=rngs)


@flax.struct.dataclass
class StubLayers:
    """Layers that put out given queries `[layers, Q, C]`. Their branches are what they were given, for queries and channels
    of one number: the mask, and the positions."""

    content: jax.Array
    primary = types.SimpleNamespace(interaction=types.SimpleNamespace(needs_regions=False))
    auxiliaries = ()

    def __call__(self, query, position, mask, surroundings):
        return self.content[None], jnp.stack([mask.astype(jnp.float32), position])


@flax.struct.dataclass
class StubHeads:
    """Heads whose offsets are all channels but the first two, and `shift` `[layers, 4]`; the first two are the logits."""

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
    # Of the positions, the sines of the lowest frequency: of 2 pi times y, x, width and height.
    stubs = types.SimpleNamespace(
        layers=StubLayers(jnp.asarray(content, jnp.float32)),
        position=lambda encoding: encoding[..., ::2],
        nms_threshold=nms_threshold,
        remat=False,
    )
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
    return HybridRefiner.__call__(stubs, queries, None, StubHeads(shift))


class TestReferenceBoxes:
    """Of two layers."""

    # The third coordinate is below what the inverse sigmoid distinguishes, the fourth above.
    BOXES = np.tile(np.array([0.5, 0.25, 1e-4, 1.0], np.float32), (4, 1))
    CONTENT = np.arange(32, dtype=np.float32).reshape(2, 4, 4) / 16
    SHIFT = np.array([[0.1, 0.2, 0.3, 0.4], [-0.1, -0.2, -0.3, -0.4]], np.float32)

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
        # Each layer is told where the boxes in front of it are: y before x.
        y_first = self.expected()[:2][..., [1, 0, 2, 3]]
        np.testing.assert_allclose(out.branches[:, 1, 0], np.sin(2 * np.pi * y_first), atol=1e-5)

    def test_gradients_reach_back_one_layer(self):
        """The box behind a layer moves with that layer's head, and with nothing before."""

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
    """One denoising query and three matching ones, of which the first two have one box. All are selected at first."""

    BOXES = np.array([[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.2, 0.8, 0.2, 0.2]], np.float32)

    def test_layers(self):
        scores = np.zeros((3, 4, 4), np.float32)
        # Behind layer 0 the second one is better, by its better class; behind layer 1 the first one, which is out by now.
        scores[0, 1:, :2] = [[0.5, 0.5], [0.1, 0.9], [0.2, 0.2]]
        scores[1, 1:, :2] = [[0.9, 0.9], [0.1, 0.2], [0.0, 0.0]]
        decoded = jax.jit(functools.partial(decode, num_denoising=1, nms_threshold=0.8))
        out = decoded(self.BOXES, scores, np.zeros((3, 4), np.float32))
        assert out.selected[:, 0].tolist() == [[True, True, True], [False, True, True], [False, True, True]]
        everything = [[1, 1, 1, 1]] * 4
        # The removed query sees the selected ones and the denoising one, but no longer itself.
        removed = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
        assert out.branches[:, 0, 0].tolist() == [everything, removed, removed]

    @pytest.mark.parametrize(
        ("selected", "expected"),
        [
            # While the first query is selected, a removed one may come back, and suppress.
            ([True, False, True], [False, True, True]),
            ([False, False, True], [False, False, True]),
            ([False, True, True], [False, True, True]),
        ],
    )
    def test_which_queries_are_valid(self, selected, expected):
        scores, duplicates = np.float32([0.1, 0.9, 0.5]), np.zeros(3, bool)
        found = select_jitted(scores, self.BOXES[1:], np.array(selected), duplicates)
        assert found.tolist() == expected


select_jitted = jax.jit(functools.partial(select_distinct, threshold=0.8))


def test_regions_are_taken_at_the_boxes_of_the_valid_image():
    """On a map whose features are x and y, from an image 32 high and 64 wide, at stride 8."""
    ramp = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), axis=-1).reshape(64, 2).astype(np.float32)
    memory = pyramid(ramp, ((8, 8),), [(4, 8)], image_size=(32, 64))
    refiner = types.SimpleNamespace(region=RegionSettings(strides=(8,), output_size=2, sampling_ratio=1))
    regions = jax.jit(functools.partial(HybridRefiner.regions, refiner))(memory, np.float32([[[0.25, 0.5, 0.25, 0.5]]]))
    # The box spans the pixels 8 to 24 in x and in y; the middles of its quarters are 12 and 20.
    np.testing.assert_allclose(regions[0, 0], [[1, 1], [2, 1], [1, 2], [2, 2]], atol=1e-6)


class TestDecoderHeads:
    """The box heads are shifts, the class heads are zero."""

    REFERENCES = np.array([[[[1e-4, 0.25, 0.5, 0.9]] * 3], [[[0.5, 0.5, 0.5, 0.5]] * 3]], np.float32)
    HIDDEN = np.zeros((2, 1, 3, 4), np.float32)

    @staticmethod
    @functools.cache
    def heads():
        """Of two layers, for matching queries and for dense ones; their shifts are 1 and 2, and 3 and 4."""
        heads = nnx.eval_shape(lambda: DecoderHeads(PredictionHead(4, 1, rngs=nnx.Rngs(0)), 2, with_dense=True))
        heads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), heads)
        for part, shifts in ((heads.matching, (1.0, 2.0)), (heads.dense, (3.0, 4.0))):
            part.boxes.layers[-1].bias = nnx.Param(jnp.repeat(jnp.array(shifts)[:, None], 4, axis=1))
            part.classes.bias = nnx.Param(10 * jnp.array(shifts)[:, None])
        return heads

    def test_boxes_start_from_the_references(self):
        """References are told from 0 and 1 down to 1e-5. The last query is dense."""
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

        # Where a reference is told from 0, its sigmoid's slope undoes that of the inverse.
        out = sigmoid(logit(0.25) + 1)
        assert gradient(self.REFERENCES)[0, 0, 0, 1] == pytest.approx(out * (1 - out) / (0.25 * 0.75), rel=1e-4)


def softmax_attention(query, key, value, heads, seen=True):
    """Of `[Q, C]`, `[K, C]` and `[K, C]`."""
    out = []
    for q, k, v in zip(*(np.split(x, heads, axis=-1) for x in (query, key, value))):
        weights = np.exp(q @ k.T / np.sqrt(q.shape[-1])) * seen
        out.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    return np.concatenate(out, axis=-1)


class StubAttention:
    """Multi-head attention with given kernels and biases."""

    self_attention, attend, project = (
        MultiHeadAttention.self_attention,
        MultiHeadAttention.attend,
        MultiHeadAttention.project,
    )

    def __init__(self, channels, heads):
        self.kernel, self.bias, self.out = array(channels, 3 * channels), array(3 * channels), array(channels, channels)
        self.heads = heads

    def input(self, x, columns):
        return x @ self.kernel[:, columns] + self.bias[columns]

    def output(self, x):
        return x @ self.out

    def projected(self, query, key, value):
        """In NumPy."""
        parts = np.split(self.kernel, 3, axis=1), np.split(self.bias, 3)
        return [x @ kernel + bias for x, kernel, bias in zip((query, key, value), *parts)]


def test_positions_are_in_queries_and_keys_alone():
    attention, x, position = StubAttention(4, 2), array(1, 3, 4), array(1, 3, 4)
    seen = np.array([[True, False, True], [True, True, True], [False, True, False]])
    out = jax.jit(attention.self_attention)(x, position, seen[None])
    there = x[0] + position[0]
    expected = softmax_attention(*attention.projected(there, there, x[0]), 2, seen) @ attention.out
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5)


class TestDeformableAttention:
    """On maps whose values are their x and y coordinates, so that the sum of the samples is the mean place."""

    @staticmethod
    def attend(reference, offsets, *, weights=0.0, bias=0.0, sizes=(8, 8), valid=True, levels=1):
        shape = (1, 1, 1, levels, 2, 2)
        ramp = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), axis=-1).reshape(64, 2).astype(np.float32)
        attention = types.SimpleNamespace(
            value=lambda tokens: tokens + bias,
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

        out = run(np.ones((1, 1, 2), np.float32), memory, np.float32([[reference]]))
        # Without the residual, 1, and the output projection, 10.
        return (out[0, 0] - 1) / 10

    def test_offsets_from_points_are_pixels(self):
        """The place 0.5 of 8 pixels is 4, and 3.5 in units that begin at the first pixel's middle."""
        np.testing.assert_allclose(self.attend((0.5, 0.25), (2.0, 1.0)), [3.5 + 2, 1.5 + 1], rtol=1e-5)

    def test_offsets_from_boxes_are_half_sides_over_the_number_of_points(self):
        """A box 4 pixels wide and 2 high, and two points: offsets count in 4 / 2 / 2 and 2 / 2 / 2 pixels."""
        np.testing.assert_allclose(self.attend((0.5, 0.5, 0.5, 0.25), (2.0, -3.0)), [3.5 + 2, 3.5 - 1.5], rtol=1e-5)

    def test_references_are_relative_to_the_valid_area(self):
        """The map is 6 high and 4 wide."""
        np.testing.assert_allclose(self.attend((0.5, 0.5), (1.0, 1.0), sizes=(6, 4)), [1.5 + 1, 2.5 + 1], rtol=1e-5)
        box = self.attend((0.5, 0.5, 0.5, 0.5), (1.0, 1.0), sizes=(6, 4))
        np.testing.assert_allclose(box, [1.5 + 0.5, 2.5 + 0.75], rtol=1e-5)

    def test_weights_sum_to_one_over_all_levels_and_points(self):
        """Two points of each of two levels, the second of which adds 100."""
        weights = np.log([0.1, 0.2, 0.3, 0.4])
        out = self.attend((0.5, 0.5), (0.0, 0.0), weights=weights, levels=2)
        np.testing.assert_allclose(out, [3.5 + 70, 3.5 + 70], rtol=1e-5)

    def test_padding_is_masked_behind_the_projection(self):
        """Otherwise the projection's bias would be sampled there."""
        np.testing.assert_array_equal(self.attend((0.5, 0.5), (0.0, 0.0), bias=7.0, valid=False), [0, 0])


def filled(make):
    """A module with random weights."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(array(*leaf.shape)), state))


def linear(module, x):
    return x @ np.asarray(module.kernel) + np.asarray(module.bias)


def norm(module, x):
    return normed(x) * np.asarray(module.scale) + np.asarray(module.bias)


def encoded(height, width):
    """Of a map whose valid area is 2 x 2."""
    encode = jax.jit(functools.partial(map_encoding, height=height, width=width, channels=8, temperature=20.0))
    return np.asarray(encode(np.full((1, 2), 2)))


class TestInteractions:
    """Two queries of eight channels, with regions of 2 x 2."""

    QUERY, POSITION = array(1, 2, 8), array(1, 2, 8)
    REGIONS = array(1, 2, 4, 8)

    def interact(self, module, memory=None):
        @jax.jit
        def run(module, query, position, regions, memory):
            return module(query, position, Surroundings(memory, None, regions))

        return np.asarray(run(module, self.QUERY, self.POSITION, self.REGIONS, memory))[0]

    def test_dynamic_convolution(self):
        module = filled(lambda rngs: DynamicConv(shared(8, region_size=2), hidden=3, rngs=rngs))
        generated = linear(module.generator, self.QUERY[0])
        for out, query, region, kernels in zip(self.interact(module), self.QUERY[0], self.REGIONS[0], generated):
            x = relu(norm(module.norm1, region @ kernels[:24].reshape(8, 3)))
            x = relu(norm(module.norm2, x @ kernels[24:].reshape(3, 8)))
            expected = query + relu(norm(module.norm3, linear(module.project, x.ravel())))
            np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)

    def test_regional_attention(self):
        """Keys have positions within the region, values have none, and neither have queries."""
        module = filled(
            lambda rngs: RegionalAttention(shared(8, region_size=2), heads=2, samples=3, temperature=20.0, rngs=rngs)
        )
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
        """To the second of two levels, without its padding; keys have positions, values have none."""
        module = filled(lambda rngs: GlobalAttention(shared(8, levels=2), heads=2, level=1, temperature=20.0, rngs=rngs))
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

    def test_point_refiner(self):
        module = filled(lambda rngs: PointInteraction(shared(8), rngs=rngs))
        expected = self.QUERY[0] + relu(norm(module.norm, linear(module.project, self.QUERY[0])))
        np.testing.assert_allclose(self.interact(module), expected, rtol=1e-4, atol=1e-4)

    def test_fully_connected_layers(self):
        """Nothing of the query is left."""
        module = filled(lambda rngs: RegionFC(shared(8, region_size=2), hidden=5, rngs=rngs))
        expected = relu(linear(module.contract, relu(linear(module.expand, self.REGIONS[0].reshape(2, 32)))))
        np.testing.assert_allclose(self.interact(module), expected, rtol=1e-4, atol=1e-4)
