"""What is around the decoder (positions, proposals, initial queries, masks, predictions) against values found by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stubs import floats, pyramid, stub

from hpr_jax.inference.detect import top_detections
from hpr_jax.models.detector import Detector, by_kind, valid_by_layer
from hpr_jax.models.encoder import Encoder, EncoderLayer
from hpr_jax.models.position import box_encoding, map_encoding
from hpr_jax.models.pyramid import flatten, pixel_centers
from hpr_jax.models.queries.denoising import group_layout
from hpr_jax.models.queries.distinct import DistinctQueries
from hpr_jax.models.queries.proposals import InitialQueries, ProposalGenerator
from hpr_jax.models.queries.proposals import best_tokens as _best
from hpr_jax.models.queries.top import TopQueries
from hpr_jax.models.refiner.hybrid import DecoderOutput, HybridRefiner
from hpr_jax.types import DenoisingQueries, Predictions


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p, np.float64))


class TestPositions:
    def test_pixels_are_numbered_from_one_and_divided_by_the_valid_size(self):
        """A map of 2 x 3 of which 2 x 2 is valid; two channels for y, two for x."""
        encode = jax.jit(functools.partial(map_encoding, height=2, width=3, channels=4, temperature=20.0, offset=-0.5))
        y, x = np.array([[0.5], [1.5]]) / 2, np.array([[0.5, 1.5, 2.5]]) / 2
        angles = [np.broadcast_to(2 * np.pi * part, (2, 3)) for part in (y, x)]
        expected = np.stack([np.sin(angles[0]), np.cos(angles[0]), np.sin(angles[1]), np.cos(angles[1])], axis=-1)
        np.testing.assert_allclose(encode(np.array([[2, 2]]))[0], expected, atol=1e-5)

    def test_frequencies_fall_with_the_temperature(self):
        """Of the four channels for y, the second pair turns more slowly by the root of the temperature."""
        encode = jax.jit(functools.partial(map_encoding, height=1, width=1, channels=8, temperature=16.0))
        slow = 2 * np.pi / 4
        np.testing.assert_allclose(encode(np.array([[1, 1]]))[0, 0, 0, :4], [0, 1, np.sin(slow), np.cos(slow)], atol=1e-5)

    def test_boxes_are_encoded_as_y_x_w_h(self):
        encoded = jax.jit(box_encoding, static_argnums=1)(floats([0.1, 0.2, 0.3, 0.4]), 4)
        angles = 2 * np.pi * np.array([0.2, 0.1, 0.3, 0.4])
        expected = [f(a) for angle in angles for a in (angle, angle / 100) for f in (np.sin, np.cos)]
        np.testing.assert_allclose(encoded, expected, atol=1e-5)

    def test_the_encoder_adds_its_settings_and_the_level_s_embedding(self):
        """There are two levels of one pixel each."""
        embedding = floats([[100, 100, 100, 100], [200, 200, 200, 200]])
        encoder = stub(level_embedding=embedding, position_temperature=16.0, position_offset=-0.5)
        memory = pyramid(np.zeros((2, 4)), ((1, 1), (1, 1)), [(1, 1), (1, 1)])
        position = jax.jit(functools.partial(Encoder._position, encoder))(memory)
        # Both y and x are half a turn.
        np.testing.assert_allclose(position[0, :2], [[100, 99, 100, 99], [200, 199, 200, 199]], atol=1e-3)
        assert position.shape == memory.tokens.shape

    def test_references_of_the_encoder_are_pixel_centres(self):
        """They are relative to the valid area; that of the first level is two of three columns wide."""
        memory = pyramid(np.zeros((8, 1)), ((2, 3), (1, 2)), [(2, 2), (1, 2)])
        expected = [(x, y) for y in (0.25, 0.75) for x in (0.25, 0.75, 1.25)] + [(0.25, 0.5), (0.75, 0.5)]
        np.testing.assert_allclose(jax.jit(pixel_centers)(memory)[0], expected, rtol=1e-6)

    def test_a_layer_of_the_encoder(self):
        """The attention reads tokens, positions and references, and a norm follows each part."""
        memory = pyramid(np.ones((1, 1)), ((1, 1),), [(1, 1)])

        def attention(query, position, memory, reference):
            return query + 10 * position + 100 * reference[..., :1] + 1000 * memory.tokens

        layer = stub(attention=attention, norm1=lambda x: 2 * x, ffn=lambda x: x + 5, norm2=lambda x: 3 * x)
        out = EncoderLayer.__call__(layer, memory, jnp.full((1, 8, 1), 7.0), jnp.full((1, 8, 2), 9.0))
        assert out.tokens[0, 0].item() == 3 * (2 * (1 + 70 + 900 + 1000) + 5)

    def test_maps_become_tokens_row_by_row(self):
        maps = [np.arange(6.0).reshape(1, 2, 3, 1), np.arange(6.0, 8.0).reshape(1, 1, 2, 1)]
        flat = jax.jit(flatten)(maps, [np.array([[2, 2]]), np.array([[1, 1]])], np.array([[16, 16]]))
        assert flat.tokens[0, :, 0].tolist() == list(range(8))
        assert flat.valid[0].tolist() == [True, True, False, True, True, False, True, False]
        assert flat.level_sizes.tolist() == [[[2, 2], [1, 1]]]
        assert flat.spatial_shapes == ((2, 3), (1, 2))

    def test_tokens_are_filled_up_to_a_multiple_of_eight(self):
        """The filling is padding, which is neither seen nor chosen."""
        sizes = [np.array([[3, 3]])]
        flat = jax.jit(flatten)([np.ones((1, 3, 3, 4), np.float32)], sizes, np.array([[24, 24]]))
        assert flat.tokens[0, :, 0].tolist() == [1] * 9 + [0] * 7
        assert flat.valid[0].tolist() == [True] * 9 + [False] * 7
        tokens = jax.jit(ProposalGenerator.tokens)(flat)
        assert tokens.inside[0, :, 0].tolist() == [True] * 9 + [False] * 7
        assert tokens.anchors.shape == (1, 16, 4)


class TestProposals:
    """A level 60 pixels wide and 2 high, the last pixel of which is padding, and one of 2 x 2."""

    SHAPES, SIZES = ((2, 60), (2, 2)), [(2, 59), (2, 2)]
    VALID = np.concatenate([np.tile(np.arange(60) < 59, 2), np.ones(4, bool)])

    def tokens(self):
        return jax.jit(ProposalGenerator.tokens)(pyramid(np.ones((124, 4)), self.SHAPES, self.SIZES, valid=self.VALID))

    def test_anchors(self):
        """Anchors are squares with sides of 0.05 at the first level and 0.1 at the next, in front of the sigmoid."""
        anchors = np.asarray(self.tokens().anchors)[0]
        np.testing.assert_allclose(anchors[1], logit([1.5 / 59, 0.25, 0.05, 0.05]), rtol=1e-4)
        np.testing.assert_allclose(anchors[61], logit([1.5 / 59, 0.75, 0.05, 0.05]), rtol=1e-4)
        np.testing.assert_allclose(anchors[121], logit([0.75, 0.25, 0.1, 0.1]), rtol=1e-4)

    def test_border_and_padding_are_outside(self):
        """The first and last valid pixels are nearer to the border than 0.01."""
        tokens = self.tokens()
        outside = np.flatnonzero(~np.asarray(tokens.inside)[0, :124, 0])
        assert outside.tolist() == [0, 58, 59, 60, 118, 119]
        assert np.all(np.isposinf(np.asarray(tokens.anchors)[0, outside]))

    def test_coarse_levels_are_outside(self):
        """Anchors of the sixth level would be 1.6 wide."""
        memory = pyramid(np.ones((6, 4)), ((1, 1),) * 6, [(1, 1)] * 6)
        assert np.asarray(jax.jit(ProposalGenerator.tokens)(memory).inside)[0, :6, 0].tolist() == [True] * 5 + [False]

    def test_border_tokens_stay_candidates(self):
        """They have the logits of a zero token and the box (1, 1, 1, 1); other boxes are anchors, moved by the head."""
        generator = stub(project=lambda x: x + 7, norm=lambda x: 2 * x)
        head = stub(logits=lambda x: x[..., :1], offsets=lambda x: x)
        run = jax.jit(lambda memory: ProposalGenerator.__call__(generator, ProposalGenerator.tokens(memory), head))
        logits, boxes = run(pyramid(np.full((60, 4), 0.1), ((1, 60),), [(1, 60)]))
        assert np.asarray(logits)[0, :2, 0] == pytest.approx([14.0, 14.2])
        np.testing.assert_array_equal(boxes[0, 0], [1, 1, 1, 1])
        np.testing.assert_allclose(boxes[0, 1], sigmoid(14.2 + logit([1.5 / 60, 0.5, 0.05, 0.05])), rtol=1e-5)


class TestTheBestTokens:
    best = staticmethod(jax.jit(_best, static_argnums=2))

    def test_ties_go_to_the_lowest_index(self):
        logits = floats([[[0, 1], [2, 0], [1, 2], [0, 3]]])
        index, found = self.best(logits, np.ones((1, 4), bool), 3)
        assert index.tolist() == [[3, 1, 2]]
        assert found.all()

    def test_logits_count_and_not_probabilities(self):
        """In float32 the sigmoids of 30 and 40 are both 1."""
        index, _ = self.best(floats([[[30, 0], [40, 0], [35, 0], [0, 0]]]), np.ones((1, 4), bool), 3)
        assert index.tolist() == [[1, 2, 0]]

    def test_padding_is_no_candidate(self):
        logits = floats([[[1, 0], [9, 9], [2, 0], [9, 9]]])
        index, found = self.best(logits, np.array([[True, False, True, False]]), 3)
        assert index[0, :2].tolist() == [2, 0]
        assert found.tolist() == [[True, True, False]]


class StubGenerator:
    """Proposals whose logits and boxes are the channels of the tokens: a logit, and a box in front of the sigmoid."""

    tokens = staticmethod(ProposalGenerator.tokens)
    chosen = ProposalGenerator.chosen

    def candidates(self, tokens, head):
        return self(tokens, head)

    def __call__(self, tokens, head):
        return head * tokens.features[..., :1], jax.nn.sigmoid(tokens.features[..., 1:])


def memory_of(scores, boxes):
    """A memory of one level. A token is a logit and a box in front of the sigmoid; the last anchor is at the border."""
    tokens = np.concatenate([np.array(scores, np.float32)[:, None], logit(np.array(boxes))], axis=1)
    return pyramid(tokens, ((1, len(tokens)),), [(1, len(tokens) - 1)])


LEFT, RIGHT, NEAR_LEFT = (0.2, 0.5, 0.2, 0.2), (0.8, 0.5, 0.2, 0.2), (0.2, 0.5, 0.2, 0.19)


class TestInitialQueries:
    SCORES = (0.1, 0.5, 0.4, 0.3)
    BOXES = (RIGHT, LEFT, NEAR_LEFT, RIGHT)

    @staticmethod
    def distinct(memory, queries, *, dense_ratio=1.5, threshold=0.8, train=True, kernel=1.0):
        """Content is ten times the tokens; the dense head reverses the order of the scores."""
        init = stub(
            generator=StubGenerator(),
            head=1.0,
            dense_head=-1.0,
            content=lambda x: 10 * kernel * x,
            queries=queries,
            dense_ratio=dense_ratio,
            nms_threshold=threshold,
            implementation="xla",
        )
        init.best_distinct = functools.partial(DistinctQueries.best_distinct, init)
        return DistinctQueries.__call__(init, memory, train=train)

    def test_distinct_ones(self):
        """The third token overlaps the better second one, and the first the better last: two queries are duplicates."""
        memory = memory_of(self.SCORES, self.BOXES)
        matching, dense = jax.jit(functools.partial(self.distinct, queries=4))(memory)
        assert dense.content.shape == (1, 6, 5)
        assert dense.proposals.valid.tolist() == [[True] * 4 + [False] * 2], "no more dense queries than tokens"
        # The content is the memory as it is, also of a token at the border.
        content = np.asarray(memory.tokens[0, [1, 3]])
        np.testing.assert_allclose(matching.content[0], np.concatenate([10 * content, np.zeros((2, 5))]), rtol=1e-6)
        np.testing.assert_allclose(matching.proposals.logits[0, :, 0], [0.5, 0.3, 0, 0], rtol=1e-6)
        np.testing.assert_allclose(matching.proposals.boxes[0], [LEFT, RIGHT, (0.5,) * 4, (0.5,) * 4], rtol=1e-5)
        assert matching.duplicates.tolist() == [[False, False, True, True]]
        assert matching.proposals.valid.all(), "duplicates are valid"

    def test_dense_ones_are_ranked_by_their_own_head_and_may_overlap(self):
        memory = memory_of(self.SCORES, self.BOXES)
        matching, dense = jax.jit(functools.partial(self.distinct, queries=2))(memory)
        np.testing.assert_allclose(matching.proposals.logits[0, :, 0], [0.5, 0.3], rtol=1e-6)
        np.testing.assert_allclose(dense.proposals.logits[0, :, 0], [-0.1, -0.3, -0.4], rtol=1e-6)
        np.testing.assert_allclose(dense.proposals.boxes[0], [RIGHT, RIGHT, NEAR_LEFT], rtol=1e-5)
        np.testing.assert_allclose(dense.content[0], 10 * memory.tokens[0, [0, 3, 2]], rtol=1e-6)
        assert not np.any(dense.duplicates)

    def test_without_dense_ones(self):
        run = functools.partial(self.distinct, queries=2, train=False)
        assert jax.eval_shape(run, memory_of(self.SCORES, self.BOXES))[1] is None

    def test_content_stops_gradients_and_proposals_do_not(self):
        """The encoder learns from the proposals alone; the projection of the content learns from the content."""
        memory = memory_of(self.SCORES, self.BOXES)

        @jax.jit
        @functools.partial(jax.jacrev, argnums=(0, 1))
        def gradients(tokens, kernel):
            matching, dense = self.distinct(dataclasses.replace(memory, tokens=tokens), 2, kernel=kernel)
            content = jnp.sum(matching.content) + jnp.sum(dense.content)
            proposals = jnp.sum(matching.proposals.logits), jnp.sum(dense.proposals.boxes[..., 0])
            return content, *proposals

        of_content, of_logits, of_boxes = gradients(memory.tokens, 1.0)
        assert not np.any(of_content[0])
        assert of_content[1] == pytest.approx(10 * np.sum(memory.tokens[0, [1, 3, 0, 3, 2]]), rel=1e-4)
        np.testing.assert_allclose(of_logits[0][0, :4, 0], [0, 1, 0, 1])
        np.testing.assert_allclose(of_boxes[0][0, :4, 1], [0.8 * 0.2, 0, 0.2 * 0.8, 0.8 * 0.2], rtol=1e-4)

    def test_top_ones_have_learned_content(self):
        """There is one vector for each rank."""
        content = jnp.arange(15.0).reshape(3, 5)
        init = stub(generator=StubGenerator(), head=1.0, content=nnx.Param(content))
        memory = memory_of(self.SCORES, self.BOXES)
        queries, dense = jax.jit(lambda memory: TopQueries.__call__(init, memory, train=True))(memory)
        assert dense is None
        np.testing.assert_array_equal(queries.content[0], content)
        np.testing.assert_allclose(queries.proposals.logits[0, :, 0], [0.5, 0.4, 0.3], rtol=1e-6)
        np.testing.assert_allclose(queries.proposals.boxes[0], [LEFT, NEAR_LEFT, RIGHT], rtol=1e-5)
        assert not np.any(queries.duplicates)


def initial(content, box, valid):
    """Queries of one image, which share content and box."""
    count = len(valid)
    boxes = jnp.full((1, count, 4), box)
    proposals = Predictions(jnp.zeros((1, count, 2)), boxes, jnp.array([valid]))
    return InitialQueries(jnp.full((1, count, 2), content), proposals, jnp.array([[False] * (count - 1) + [True]]))


class TestDecoderInput:
    """There are two denoising groups of a positive and a negative query, and a slot that no group fills; three matching
    queries, the last of which is not valid; and two dense queries."""

    def queries(self):
        one = np.array([[1]])
        layout = jax.jit(group_layout, static_argnums=3)(one, one, 2 * one, 5)
        denoising = DenoisingQueries(labels=jnp.zeros((1, 5), jnp.int32), boxes=jnp.full((1, 5, 4), 0.1), **layout)
        detector = stub(denoiser=stub(embed=lambda queries: jnp.full((1, 5, 2), 1.0)), dtype=jnp.float32)
        matching, dense = initial(2.0, 0.2, [True, True, False]), initial(3.0, 0.3, [True, True])
        join = jax.jit(functools.partial(Detector.decoder_input, detector))
        return join(denoising, matching, dense)

    def test_who_sees_whom(self):
        seen = """
            xx... xx. ..
            xx... xx. ..
            ..xx. xx. ..
            ..xx. xx. ..
            ..... xx. ..
            ..... xx. ..
            ..... xx. ..
            ..... xx. ..
            ..... ... xx
            ..... ... xx
        """
        rows = ["".join("x" if x else "." for x in row) for row in np.asarray(self.queries().mask)[0]]
        assert rows == ["".join(row.split()) for row in seen.strip().splitlines()]

    def test_order(self):
        queries = self.queries()
        assert queries.content[0, :, 0].tolist() == [1] * 5 + [2] * 3 + [3] * 2
        np.testing.assert_allclose(queries.reference_boxes[0, :, 0], [0.1] * 5 + [0.2] * 3 + [0.3] * 2)
        assert (queries.num_denoising, queries.num_matching, queries.num_dense) == (5, 3, 2)
        assert queries.duplicates.tolist() == [[False, False, True]]
        assert queries.matching == slice(5, 8)

    def test_predictions_are_split_in_the_same_order(self):
        number = jnp.arange(10.0).reshape(1, 1, 10, 1)
        parts = by_kind(Predictions(number, number, number[..., 0]), self.queries())
        for part, expected in ((parts.denoising, range(5)), (parts.matching, range(5, 8)), (parts.dense, range(8, 10))):
            assert part is not None
            assert all(array.ravel().tolist() == list(expected) for array in (part.logits, part.boxes, part.valid))

    def test_a_query_without_a_token_is_seen_by_none_when_alone(self):
        detector = stub(denoiser=None, dtype=jnp.float32)
        join = jax.jit(lambda matching: Detector.decoder_input(detector, None, matching, None))
        queries = join(initial(2.0, 0.2, [True, False]))
        assert queries.mask.tolist() == [[[True, False], [True, False]]]
        zeros = jnp.zeros((1, 1, 2, 1))
        parts = by_kind(Predictions(zeros, zeros, zeros[..., 0]), queries)
        assert parts.denoising is None
        assert parts.dense is None


class StubRefiner:
    """Returns what it was made with. Its norm multiplies by 3, and the norms of its branches by 5 and 7."""

    branches = ("a", "b")
    look_forward_twice, output_epsilon = True, 1e-5
    branch_norms = (lambda x: 5 * x, lambda x: 7 * x)

    def __init__(self, decoded):
        self.decoded = decoded

    def norm(self, x):
        return 3 * x

    normed = HybridRefiner.normed

    def __call__(self, queries, memory, heads):
        return self.decoded


class StubHeads:
    """Logits are the queries, and boxes the references, times a number."""

    def __init__(self, number):
        self.number = number

    def predict(self, hidden, references, num_dense, epsilon):
        return self.number * hidden, self.number * references


class TestWhatFollowsTheDecoder:
    """Two layers, two images, three queries and two branches; the third query is not valid. The hidden states of a layer and
    branch are all one number, and so are the references in front of a layer."""

    # In the second image the first query is selected, and so all are valid.
    SELECTED = jnp.array([[[True] * 3] * 2, [[False, True, False], [True, False, False]]])

    def outputs(self, refiner=StubRefiner):
        def numbers(values):
            values = floats(values)
            return np.broadcast_to(values[..., None, None, None], (*values.shape, 2, 3, 4))

        decoded = DecoderOutput(numbers([1, 2]), numbers([[10, 20], [30, 40]]), numbers([0, 1, 2]), self.SELECTED)
        one = initial(0.0, 0.5, [True, True, False])
        matching = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), one)
        detector = stub(
            precision="default",
            backbone=lambda images, sizes, keys: (images, sizes),
            neck=lambda maps, sizes: ([maps], [sizes]),
            encoder=lambda memory: memory,
            query_init=lambda memory, train: (matching, None),
            refiner=refiner(decoded),
            denoiser=None,
            heads=StubHeads(1),
            branch_heads=[StubHeads(100), StubHeads(1000)],
            dtype=jnp.float32,
        )
        detector.decoder_input = functools.partial(Detector.decoder_input, detector)
        detector.remember = functools.partial(Detector.remember, detector)
        return jax.jit(functools.partial(Detector.__call__, detector))(np.ones((2, 2, 2, 3)), np.array([[2, 2], [2, 1]]))

    def test_every_branch_has_its_own_norm_and_heads(self):
        outputs = self.outputs()
        assert np.asarray(outputs.primary.matching.logits)[:, 0, 0, 0].tolist() == [3 * 1, 3 * 2]
        branches = {name: np.asarray(b.matching.logits)[:, 0, 0, 0].tolist() for name, b in outputs.branches.items()}
        assert branches == {"a": [100 * 5 * 10, 100 * 5 * 30], "b": [1000 * 7 * 20, 1000 * 7 * 40]}
        stages = outputs.intermediates
        assert np.asarray(stages.branch_normed)[:, :, 0, 0, 0].tolist() == [[50, 140], [150, 280]]

    def test_branches_start_from_the_primary_branch_s_references(self):
        """These are the references in front of each layer."""
        outputs = self.outputs()
        assert np.asarray(outputs.primary.matching.boxes)[:, 0, 0, 0].tolist() == [0, 1]
        assert np.asarray(outputs.branches["b"].matching.boxes)[:, 0, 0, 0].tolist() == [0, 1000]

    def test_without_a_norm_heads_read_the_hidden_states(self):
        class WithoutNorm(StubRefiner):
            norm = None
            branch_norms = ()

        outputs = self.outputs(WithoutNorm)
        assert np.asarray(outputs.primary.matching.logits)[:, 0, 0, 0].tolist() == [1, 2]
        assert np.asarray(outputs.branches["b"].matching.logits)[:, 0, 0, 0].tolist() == [1000 * 20, 1000 * 40]

    def test_valid_queries(self):
        outputs = self.outputs()
        expected = [[[True, True, False]] * 2, [[False, True, False], [True, True, False]]]
        assert outputs.primary.matching.valid.tolist() == expected
        assert outputs.branches["a"].matching.valid.tolist() == expected
        # The attention masks know the selected queries alone.
        survivor = outputs.intermediates.attention_mask[1, 1]
        assert survivor.tolist() == [[True, True, True], [True, False, False], [True, False, False]]

    def test_denoising_and_dense_queries_are_valid_in_all_layers(self):
        denoising = stub(used=np.array([[True, False]]))
        dense = stub(proposals=stub(valid=np.array([[True, False]])))
        valid = valid_by_layer(denoising, dense, jnp.array([[[True]], [[False]]]))
        assert valid.tolist() == [[[True, False, True, True, False]], [[True, False, False, True, False]]]


def test_images_become_zero_mean_and_unit_variance():
    """Rows beyond the valid one are zero, whatever is in them."""
    detector = stub(pixel_mean=(10.0, 20.0, 30.0), pixel_std=(1.0, 2.0, 4.0))
    images = np.full((1, 2, 1, 3), 40, np.uint8)
    normalized = jax.jit(functools.partial(Detector.normalize, detector))(images, np.array([[1, 1]]))
    np.testing.assert_array_equal(normalized[0, :, 0], [[30, 10, 2.5], [0, 0, 0]])


class TestDetections:
    """Three queries of two classes in an image of height 100 and width 200."""

    LOGITS = floats([[[1, 3], [2, -5], [9, 9]]])
    BOXES = floats([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4], [0.5, 0.5, 1, 1]]])
    VALID = jnp.array([[True, True, False]])
    detect = staticmethod(jax.jit(top_detections, static_argnums=2))

    def test_the_best_pairs_of_query_and_class(self):
        """A query may be found twice; boxes are clipped; queries that are not valid are not found."""
        found = self.detect(Predictions(self.LOGITS, self.BOXES, self.VALID), np.array([[100, 200]]), 3)
        boxes, scores, labels, valid = (np.asarray(array)[0] for array in found)
        assert labels.tolist() == [1, 0, 0]
        np.testing.assert_allclose(scores, sigmoid([3, 2, 1]), rtol=1e-5)
        first = [80, 30, 120, 70]
        np.testing.assert_allclose(boxes, [first, [140, 0, 200, 30], first], rtol=1e-5)
        assert valid.all()

    def test_fewer_pairs_than_asked_for(self):
        found = self.detect(Predictions(self.LOGITS, self.BOXES, self.VALID), np.array([[100, 200]]), 300)
        *_, scores, labels, valid = (np.asarray(array)[0] for array in found)
        assert valid.tolist() == [True] * 4 + [False] * 2
        assert labels[:4].tolist() == [1, 0, 0, 1]
        assert scores[4:].tolist() == [0, 0]
