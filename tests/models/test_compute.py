"""How a detector computes, the section `compute` of configs: types and rematerialisation change no results."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.build import Compute, abstract_detector
from hpr_jax.models.heads import PredictionHead

IMAGES = np.random.default_rng(0).normal(size=(2, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)
SIZES = jnp.array([[60, 50], [64, 64]])


def computing(**compute):
    """The tiny detector, with the weights of `tiny.detector` and these settings of the section `compute`."""
    config = tiny.config()
    detector = abstract_detector(config.model, tiny.CLASSES, {**config.compute, **compute})
    nnx.update(detector, nnx.state(tiny.detector()))
    return detector


@functools.cache
def gradients(**compute):
    """A sum over the predictions of a detector with two refiners and these settings, and its gradients."""
    config = tiny.config(model="deformable_detr")
    config.model.refiner.auxiliaries = ("dynamic_conv",)
    detector = abstract_detector(config.model, tiny.CLASSES, {**config.compute, **compute})
    tiny.fill(detector)
    graph, params, rest = tiny.split_parameters(detector)

    def run(params):
        outputs = nnx.merge(graph, params, rest)(jnp.asarray(IMAGES), SIZES, train=True)
        branches = outputs.primary, *outputs.branches.values()
        return sum(jnp.sum(jnp.square(x.matching.logits)) + jnp.sum(x.matching.boxes) for x in branches)

    return jax.jit(jax.value_and_grad(run))(params)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    (stored, a), (computed, b) = gradients(remat=()), gradients(remat=("backbone", "encoder", "refiner"))
    np.testing.assert_allclose(stored, computed, rtol=1e-5)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(a))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=1e-4 * scale)


@pytest.mark.parametrize("model", ["ddq", "dino"])
def test_bfloat16_lies_between_images_and_heads(model):
    detector = abstract_detector(tiny.config(model=model).model, tiny.CLASSES, {"dtype": "bfloat16"})
    outputs = jax.eval_shape(lambda d: d(jnp.asarray(IMAGES), SIZES, train=True), detector)
    inner = outputs.intermediates
    for name in ("memory", "initial_content", "hidden", "normed", "branch_hidden", "branch_normed"):
        assert getattr(inner, name).dtype == jnp.bfloat16, name
    assert inner.reference_boxes.dtype == jnp.float32
    for branch in (outputs.primary, *outputs.branches.values()):
        assert (branch.matching.logits.dtype, branch.matching.boxes.dtype) == (jnp.float32, jnp.float32)


def kernels(jaxpr):
    """Types of the left factors and shapes of the right ones of all products."""
    return [(product.invars[0].aval.dtype, product.invars[1].aval.shape) for product in jaxprs.products(jaxpr)]


@functools.cache
def products_of_training():
    """`kernels` of the forward pass of training in bfloat16."""
    detector = computing(dtype="bfloat16")
    return kernels(jax.make_jaxpr(lambda d, x: d(x, SIZES, train=True))(detector, jnp.asarray(IMAGES)).jaxpr)


def test_products_in_float32_are_those_of_the_heads():
    """Others are weighted sums of sampled rows, and the projection of the encodings of positions in a region."""
    channels = tiny.config().model.channels
    all_products = products_of_training()
    assert sum(dtype == jnp.bfloat16 for dtype, _ in all_products) > 20
    allowed = {(channels, channels), (channels, 4), (channels, tiny.CLASSES)}
    for dtype, kernel in all_products:
        # Gathered rows have three axes.
        assert dtype == jnp.bfloat16 or kernel in allowed or len(kernel) == 3, kernel


@pytest.mark.parametrize("outputs", [tiny.CLASSES, 4])
def test_products_of_all_heads_are_in_float32(outputs):
    """Class layers and the last layers of box heads: of proposals, dense proposals, and decoder layers, whose products come
    as one for each of three branches and of two kinds of queries."""
    channels, layers = tiny.config().model.channels, tiny.config().model.refiner.layers
    single = [dtype for dtype, kernel in products_of_training() if kernel == (channels, outputs)]
    stacked = [dtype for dtype, kernel in products_of_training() if kernel == (layers, channels, outputs)]
    assert len(single) >= 4
    assert len(stacked) >= 6
    assert {*single, *stacked} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_head_computes_in_float32(dtype):
    head = PredictionHead(16, tiny.CLASSES, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 5, 16), dtype)
    for function, count in ((PredictionHead.logits, 1), (PredictionHead.offsets, 3)):
        inner = kernels(jax.make_jaxpr(function)(head, x).jaxpr)
        assert [kind for kind, _ in inner] == [jnp.float32] * count
        assert jax.eval_shape(function, head, x).dtype == jnp.float32


@pytest.mark.slow
def test_bfloat16_is_close_and_its_gradients_are_float32():
    (exact, _), (rounded, gradient) = gradients(remat=()), gradients(remat=(), dtype="bfloat16")
    assert rounded == pytest.approx(float(exact), rel=0.05)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"dtype": "float16"}, r"config\.compute\.dtype names 'float16'; known are float32, bfloat16"),
        ({"operations": "cuda"}, r"config\.compute\.operations names 'cuda'; known are auto, xla, pallas"),
        ({"remat": ("neck",)}, r"config\.compute\.remat names 'neck'; known are backbone, encoder, refiner"),
    ],
)
def test_unknown_settings(setting, sentence):
    with pytest.raises(UserError, match=sentence):
        Compute(**setting)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="kernels are refused on machines without a GPU alone")
def test_kernels_without_a_gpu():
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and JAX has found only the platform cpu; set it to 'auto'"):
        Compute(operations="pallas")


@pytest.mark.parametrize("model", ["ddq", "dino"])
def test_no_parameter_is_weakly_typed(model):
    """The first training step would make it strongly typed, and the second would be compiled again."""
    state = nnx.state(abstract_detector(tiny.config(model=model).model, tiny.CLASSES))
    assert not [path for path, leaf in nnx.to_flat_state(state) if leaf.get_value().weak_type]
