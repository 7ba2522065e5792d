"""Modules compute the same chunk by chunk as at once, and with values computed again in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hpr_jax.models import layers
from hpr_jax.models.layers import FeedForward, rematerialized, saved
from hpr_jax.models.refiner import interaction
from hpr_jax.models.refiner.dynamic_conv import DynamicConv
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings
from hpr_jax.models.refiner.regional_attention import RegionalAttention
from hpr_jax.ops.chunks import by_chunks
from hpr_jax.ops.platform import programs_for

RNG = np.random.default_rng(0)
SHARED = SharedSettings(channels=8, heads=2, levels=1, points=1, region_size=2)
QUERY, REGIONS = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((2, 5, 8), (2, 5, 4, 8)))


def feed_forward(rngs):
    return FeedForward(8, 16, rngs=rngs), lambda module, query, regions: module(query)


def dynamic_conv(rngs):
    return DynamicConv(SHARED, hidden=4, rngs=rngs), refine


def regional_attention(rngs):
    return RegionalAttention(SHARED, heads=2, samples=3, temperature=20.0, rngs=rngs), refine


def refine(module, query, regions):
    return module(query, jnp.zeros_like(query), Surroundings(None, None, regions))


@pytest.mark.parametrize("make", [feed_forward, dynamic_conv, regional_attention])
def test_modules_by_chunks(make, monkeypatch):
    """Ten queries at once and four at a time: the results, and the gradients of parameters, queries and regions."""
    module, call = make(nnx.Rngs(0))
    graph, state = nnx.split(module)

    def loss(state, query, regions):
        # Sines, so that each result has a different gradient.
        return jnp.sum(jnp.sin(call(nnx.merge(graph, state), query, regions)))

    run = jax.value_and_grad(loss, argnums=(0, 1, 2))
    at_once = run(state, QUERY, REGIONS)
    sizes = []

    def chunks(function, size, rows):
        sizes.append(size)
        return by_chunks(function, size, rows)

    for owner, name in ((layers, "ROWS"), (interaction, "CHUNK")):
        monkeypatch.setattr(owner, name, 4)
        monkeypatch.setattr(owner, "by_chunks", chunks)
    for one, other in zip(jax.tree.leaves(at_once), jax.tree.leaves(run(state, QUERY, REGIONS))):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert sizes == [4]


def test_saved_results_are_not_computed_again():
    kernels = tuple(jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((8, 16), (16, 8)))

    def network(mark):
        def function(kernels, x):
            first, last = kernels
            return jnp.sin(mark(jnp.sin(x @ first) @ last))

        return function

    def gradient(function):
        return jax.grad(lambda kernels: jnp.sum(function(kernels, QUERY[0])))

    def products(function):
        return str(jax.make_jaxpr(gradient(function))(kernels)).count("dot_general")

    marked, unmarked = network(saved), network(lambda x: x)
    # Two products forward, three backward (the input has no gradient).
    assert products(marked) == 5
    assert products(rematerialized(unmarked)) == 7
    assert products(rematerialized(marked)) == 6
    for one, other in zip(gradient(marked)(kernels), gradient(rematerialized(marked))(kernels)):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_layers_are_no_loop_on_gpus(remat):
    """Values and gradients are those of CPUs, which run a loop over two layers."""
    graph, stacked = nnx.split(layers.stack(lambda rngs: layers.linear(8, 8, rngs=rngs), 2, rngs=nnx.Rngs(0)))

    def run(platform):
        def loss(stacked, x):
            def step(x, shared, layer):
                x = jnp.sin(layer(x)) * shared
                return x, jnp.sum(x)

            x, sums = layers.scan_layers(step, x, x + 1, nnx.merge(graph, stacked), remat=remat)
            return jnp.sum(jnp.cos(x)) + jnp.prod(sums)

        with programs_for(platform):
            lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(stacked, QUERY).lower()
        assert ("stablehlo.while" in lowered.as_text()) == (platform == "cpu")
        return lowered.compile()(stacked, QUERY)

    for one, other in zip(jax.tree.leaves(run("cpu")), jax.tree.leaves(run("cuda")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
