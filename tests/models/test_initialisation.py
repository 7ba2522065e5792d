"""Initial weights of each part: constants, and random numbers whose extremes come near their bounds. Copies of heads are
tested in `test_detector.py`."""

from typing import Any

import numpy as np
import pytest
from flax import nnx
from stubs import stub

from hpr_jax.models.attention import DeformableAttention, MultiHeadAttention
from hpr_jax.models.encoder import Encoder
from hpr_jax.models.heads import PredictionHead
from hpr_jax.models.layers import FeedForward
from hpr_jax.models.neck import Projection
from hpr_jax.models.queries.denoising import Denoiser
from hpr_jax.models.queries.distinct import DistinctQueries
from hpr_jax.models.queries.proposals import ProposalGenerator
from hpr_jax.models.queries.top import TopQueries
from hpr_jax.models.refiner.dynamic_conv import DynamicConv
from hpr_jax.models.refiner.hybrid import HybridRefiner, RegionSettings
from hpr_jax.models.refiner.interaction import SharedSettings
from hpr_jax.models.refiner.layer import Merge
from hpr_jax.models.refiner.point import PointInteraction
from hpr_jax.models.refiner.region_fc import RegionFC
from hpr_jax.models.refiner.regional_attention import RegionalAttention

# Number of channels wherever possible: the fewer shapes there are, the less is compiled.
WIDTH = 32
SHARED = SharedSettings(channels=WIDTH, heads=2, levels=1, points=1, region_size=1)


def rngs():
    return nnx.Rngs(0)


def assert_uniform(parameter, bound):
    """Asserts that values lie in [-bound, bound], and that the extremes come near the bounds."""
    values = np.asarray(parameter[...])
    for extreme in (-values.min(), values.max()):
        assert 0.8 * bound < extreme <= 1.0001 * bound


def assert_xavier(parameter):
    assert_uniform(parameter, (6 / sum(parameter.shape)) ** 0.5)


def assert_zero(*parameters):
    assert not any(np.any(parameter[...]) for parameter in parameters)


def assert_normal(parameter):
    values = np.asarray(parameter[...])
    assert abs(values.mean()) < 0.15
    assert abs(values.std() - 1) < 0.15


def test_multi_head_attention():
    """The projections of queries, keys and values are initialised as one kernel."""
    attention = MultiHeadAttention(WIDTH, 2, rngs=rngs())
    assert_uniform(attention.input.kernel, (6 / (4 * WIDTH)) ** 0.5)
    assert_xavier(attention.output.kernel)
    assert_zero(attention.input.bias, attention.output.bias)


def test_deformable_attention():
    """Eight heads look in the eight directions of a compass; their first point is one pixel away, the second two."""
    attention = DeformableAttention(WIDTH, 8, 2, 2, rngs=rngs())
    assert attention.offsets.bias is not None
    assert_zero(attention.offsets.kernel, attention.weights.kernel, attention.weights.bias)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = [[[np.array(direction) * pixels for pixels in (1, 2)]] * 2 for direction in directions]
    np.testing.assert_allclose(np.asarray(attention.offsets.bias[...]).reshape(8, 2, 2, 2), expected, atol=1e-5)
    assert_xavier(attention.value.kernel)
    assert_xavier(attention.output.kernel)
    assert_zero(attention.value.bias, attention.output.bias)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: FeedForward(WIDTH, WIDTH, rngs=rngs()), ("expand", "contract")),
        (lambda: DynamicConv(SHARED, hidden=16, rngs=rngs()), ("generator", "project")),
        (lambda: RegionalAttention(SHARED, heads=2, samples=1, temperature=20.0, rngs=rngs()), ("spawn", "project")),
        (lambda: RegionFC(SHARED, hidden=WIDTH, rngs=rngs()), ("expand", "contract")),
        (lambda: PointInteraction(SHARED, rngs=rngs()), ("project",)),
        (lambda: ProposalGenerator(WIDTH, rngs=rngs()), ("project",)),
    ],
)
def test_layers_of_encoder_and_decoder(make, names):
    """Kernels are Xavier-uniform; biases are drawn as PyTorch does by default."""
    module = make()
    for name in names:
        layer = getattr(module, name)
        assert_xavier(layer.kernel)
        assert_uniform(layer.bias, len(layer.kernel) ** -0.5)


def test_positions_of_the_decoder():
    def make_layer(rngs: nnx.Rngs) -> Any:
        return PointInteraction(SHARED, rngs=rngs)

    settings: dict[str, Any] = {
        "branches": (),
        "nms_threshold": None,
        "region": RegionSettings(),
        "remat": False,
        "rngs": rngs(),
    }
    for layer in HybridRefiner(make_layer, layers=1, channels=WIDTH, **settings).position.layers:
        assert_xavier(layer.kernel)


def test_norms():
    norm = PointInteraction(SHARED, rngs=rngs()).norm
    assert_zero(norm.bias)
    np.testing.assert_array_equal(norm.scale[...], np.ones(WIDTH))


def test_merges():
    """Weights are ones, or Xavier-uniform as in the published DDQ: up to 0.152 at 256 channels and three paths."""
    np.testing.assert_array_equal(Merge(3, 256, "learned_vector", (), rngs=rngs()).weights[...], np.ones((256, 3)))
    assert_uniform(Merge(3, 256, "learned_vector", "xavier", rngs=rngs()).weights, 0.1522)


def test_heads():
    """At first all classes have the probability 0.01, and boxes do not move. Other layers are drawn as PyTorch does by
    default."""
    head = PredictionHead(WIDTH, WIDTH, rngs=rngs())
    assert head.classes.bias is not None
    np.testing.assert_allclose(head.classes.bias[...], np.full(WIDTH, -np.log(99)), rtol=1e-6)
    assert_zero(head.boxes.layers[-1].kernel, head.boxes.layers[-1].bias)
    for kernel in (head.classes.kernel, head.boxes.layers[0].kernel, head.boxes.layers[1].kernel):
        assert_uniform(kernel, WIDTH**-0.5)


def test_initial_queries():
    """Learned content is Xavier-uniform, and the projection of DDQ's content is drawn as PyTorch does by default."""
    content = TopQueries(stub(), WIDTH, queries=WIDTH, rngs=rngs()).content
    assert_xavier(content)
    distinct = DistinctQueries(stub(), stub(), WIDTH, queries=8, dense_ratio=1.5, nms_threshold=0.8, rngs=rngs())
    assert_uniform(distinct.content.kernel, WIDTH**-0.5)
    assert_uniform(distinct.content.bias, WIDTH**-0.5)


def test_embeddings():
    """The embeddings of labels and of levels are normally distributed."""
    settings: dict[str, Any] = {"queries": 4, "label_noise": 0.5, "box_noise": 1.0, "views_per_chunk": 2}
    assert_normal(Denoiser(WIDTH, WIDTH, rngs=rngs(), **settings).embedding)
    sizes: dict[str, Any] = {"layers": 1, "channels": WIDTH, "heads": 2, "levels": WIDTH, "points": 1, "hidden": WIDTH}
    more: dict[str, Any] = {"position_temperature": 20.0, "position_offset": 0.0, "remat": False, "implementation": None}
    encoder = stub()
    Encoder.__init__(encoder, **sizes, **more, rngs=rngs())
    assert_normal(encoder.level_embedding)


def test_neck():
    """Kernels are Xavier-uniform, with the inputs and outputs of all pixels of the kernel counted."""
    for size, kernel_size in ((WIDTH, 1), (8, 3)):
        projection = Projection(size, size, kernel_size, 1, 4, True, rngs=rngs())
        assert_uniform(projection.conv.kernel, (6 / (2 * size * kernel_size**2)) ** 0.5)
        assert_zero(projection.bias)
