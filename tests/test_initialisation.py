"""How weights start: bounds and constants of the published initialisation. Layers are large enough to come near a bound."""

import functools

import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.models.attention import DeformableAttention, MultiHeadAttention
from hpr_jax.models.build import build_detector
from hpr_jax.models.denoising import Denoiser
from hpr_jax.models.encoder import Encoder
from hpr_jax.models.heads import PredictionHead
from hpr_jax.models.interactions import PointRefiner
from hpr_jax.models.layers import FeedForward
from hpr_jax.models.neck import Projection
from hpr_jax.models.queries import DistinctQueries, ProposalGenerator, TopQueries
from hpr_jax.models.refiner import HybridRefiner, Merge, RegionSettings
from hpr_jax.models.region import DynamicConv, RegionalAttention, RegionFC

WIDTH = 32


def rngs():
    return nnx.Rngs(0)


def assert_uniform(parameter, bound):
    """In [-bound, bound], and all of it."""
    values = np.asarray(parameter[...])
    assert 0.8 * bound < -values.min() <= bound * 1.0001
    assert 0.8 * bound < values.max() <= bound * 1.0001


def assert_xavier(parameter):
    assert_uniform(parameter, (6 / sum(parameter.shape[-2:])) ** 0.5)


def assert_normal(parameter):
    values = np.asarray(parameter[...])
    assert abs(values.mean()) < 0.15
    assert abs(values.std() - 1) < 0.15


def assert_constant(parameter, value):
    np.testing.assert_allclose(parameter[...], np.full(parameter.shape, value), rtol=1e-6)


def test_multi_head_attention():
    """Queries, keys and values are drawn as one kernel."""
    attention = MultiHeadAttention(WIDTH, 2, rngs=rngs())
    assert_uniform(attention.input.kernel, (6 / (WIDTH + 3 * WIDTH)) ** 0.5)
    assert_xavier(attention.output.kernel)
    assert_constant(attention.input.bias, 0)
    assert_constant(attention.output.bias, 0)
