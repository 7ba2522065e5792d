"""Attention and the interactions of refiners against values computed by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from stubs import array, floats, pyramid, stub

from hpr_jax.models.attention import DeformableAttention, MultiHeadAttention
from hpr_jax.models.position import map_encoding
from hpr_jax.models.refiner.dynamic_conv import DynamicConv
from hpr_jax.models.refiner.global_attention import GlobalAttention
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings
from hpr_jax.models.refiner.point import PointInteraction
from hpr_jax.models.refiner.region_fc import RegionFC
from hpr_jax.models.refiner.regional_attention import RegionalAttention

SHARED = SharedSettings(channels=8, heads=2, levels=2, points=1, region_size=2)


def normed(x):
    """Mean 0 and variance 1 over the channels."""
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def relu(x):
    return np.maximum(x, 0)


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
        self.heads, self.implementation = heads, None

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

        attention.samples = functools.partial(DeformableAttention.samples, attention)

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
            def interacted(filled):
                return module(query, position, Surroundings(memory, jnp.zeros((1, 2, 4)), regions, filled))

            # Bins of zeros behind those of a region do not count.
            return interacted(None), interacted(jnp.pad(regions, ((0, 0), (0, 0), (0, 3), (0, 0))))

        alone, filled = run(module, self.QUERY, self.POSITION, self.REGIONS, memory)
        np.testing.assert_allclose(filled, alone, rtol=1e-5, atol=1e-5)
        return np.asarray(alone)[0]

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
        tokens = np.asarray(memory.tokens)[0, 4:10][valid[4:]]
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
