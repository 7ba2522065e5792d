"""How a detector computes: types, rematerialisation, implementations, kept programs; none of it changes what is computed."""

import ctypes
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import Compute, abstract_detector
from hpr_jax.models.heads import PredictionHead
from hpr_jax.ops.layer_norm import normalized
from hpr_jax.ops.linear import affine
from hpr_jax.runtime.compilation_cache import enable_compilation_cache
from hpr_jax.runtime.host_memory import return_freed_memory, return_memory_of_compiling
from hpr_jax.weights.checkpoint import Meta

IMAGES = np.random.default_rng(0).normal(size=(2, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)
SIZES = jnp.array([[60, 50], [64, 64]])


def computing(**compute):
    """The tiny detector of the other tests, with other compute settings."""
    config = tiny.config()
    detector = abstract_detector(config.model, tiny.CLASSES, {**config.compute, **compute})
    nnx.update(detector, nnx.state(tiny.detector()))
    return detector


@functools.cache
def gradients(**compute):
    """A sum over predictions, and its gradients, of the tiny detector with these compute settings."""
    graph, params, rest = nnx.split(computing(**compute), nnx.Param, ...)

    @jax.jit
    def run(params):
        outputs = nnx.merge(graph, params, rest)(jnp.asarray(IMAGES), SIZES, train=True)
        kept = outputs.primary.matching, *(branch.matching for branch in outputs.branches.values())
        return sum(jnp.sum(jnp.square(x.logits)) + jnp.sum(x.boxes) for x in kept)

    return jax.value_and_grad(run)(params)


def test_rematerialisation_changes_no_gradient():
    (stored, a), (computed, b) = gradients(remat=()), gradients(remat=("backbone", "encoder", "refiner"))
    np.testing.assert_allclose(stored, computed, rtol=1e-5)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
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


def products(jaxpr, found):
    """Types of the inputs and shapes of the kernels of all matrix products and convolutions, also inside loops."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append((equation.invars[0].aval.dtype, equation.invars[1].aval.shape))
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                item = getattr(item, "jaxpr", item)
                if hasattr(item, "eqns"):
                    products(item, found)
    return found


@functools.cache
def products_of_training():
    """`products` of the forward pass of training in bfloat16."""
    return products(
        jax.make_jaxpr(lambda d, x: d(x, SIZES, train=True))(computing(dtype="bfloat16"), jnp.asarray(IMAGES)).jaxpr, []
    )


def test_products_in_float32_are_those_of_the_heads():
    """And weighted sums of sampled rows, and the encoding of positions in a region."""
    channels = tiny.config().model.channels
    whole = products_of_training()
    assert sum(dtype == jnp.bfloat16 for dtype, _ in whole) > 20
    allowed = {(channels, channels), (channels, 4), (channels, tiny.CLASSES)}
    for dtype, kernel in whole:
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
        inner = products(jax.make_jaxpr(function)(head, x).jaxpr, [])
        assert [kind for kind, _ in inner] == [jnp.float32] * count
        assert jax.eval_shape(function, head, x).dtype == jnp.float32


def test_bfloat16_is_close_and_its_gradients_are_float32():
    (exact, _), (rounded, gradient) = gradients(remat=()), gradients(remat=(), dtype="bfloat16")
    assert rounded == pytest.approx(float(exact), rel=0.05)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3)])
def test_gradients_of_linear_layers(inputs, outputs, with_bias):
    rng = np.random.default_rng(0)
    x, kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 4, inputs), (inputs, outputs), (outputs,)))
    bias = bias if with_bias else None

    def plain(x, kernel, bias):
        return x @ kernel + (0 if bias is None else bias)

    def run(function, x):
        # Cubed, so that the gradient of each output is another.
        return jax.value_and_grad(lambda *arguments: jnp.sum(function(*arguments) ** 3), argnums=(0, 1, 2))(x, kernel, bias)

    for ours, theirs in zip(*map(jax.tree.leaves, (run(affine, x), run(plain, x)))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    _, (of_x, *of_parameters) = run(affine, x.astype(jnp.bfloat16))
    assert of_x.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(of_parameters))


def test_gradients_of_layer_normalisation():
    rng = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(rng.normal(loc=2.0, size=s), jnp.float32) for s in ((2, 4, 6), (6,), (6,)))

    def plain(x, scale, bias):
        centered = x - jnp.mean(x, axis=-1, keepdims=True)
        return centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5) * scale + bias

    def run(function, x):
        # Cubed, so that the gradient of each output is another.
        return jax.value_and_grad(lambda *arguments: jnp.sum(function(*arguments) ** 3), argnums=(0, 1, 2))(x, scale, bias)

    def ours(*arguments):
        return normalized(*arguments, 1e-5)

    for a, b in zip(*map(jax.tree.leaves, (run(ours, x), run(plain, x)))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    rounded = x.astype(jnp.bfloat16)
    _, gradients = run(ours, rounded)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for a, b in zip(gradients, run(ours, rounded.astype(jnp.float32))[1]):
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(b)


def test_memory_goes_back(monkeypatch):
    trims = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=trims.append))
    return_memory_of_compiling()
    return_memory_of_compiling()
    run = jax.jit(lambda x: x + 1)
    run(1.0)
    assert trims == [0]
    run(2.0)
    assert trims == [0]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    return_freed_memory()


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


@pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="of machines without a GPU: with one, kernels run, and nothing is refused"
)
def test_kernels_without_a_gpu():
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and JAX has found only the platform cpu; set it to 'auto'"):
        Compute(operations="pallas")


@pytest.mark.parametrize("model", ["ddq", "dino"])
def test_no_parameter_is_weakly_typed(model):
    """The first step would make it a strong one, and the second be compiled anew."""
    state = nnx.state(abstract_detector(tiny.config(model=model).model, tiny.CLASSES))
    assert not [path for path, leaf in nnx.to_flat_state(state) if leaf.get_value().weak_type]


def test_checkpoints_from_before_the_section():
    """Rematerialisation was a part of their models' configs, and they knew no strong views."""
    config = to_plain(tiny.config())
    now = dict(config)
    config.pop("compute")
    config["model"] = {**config["model"], "remat": True, "backbone": {**config["model"]["backbone"], "remat": False}}
    config["augmentation"]["strong_views"] = True
    config["augmentation"] = {k: v for k, v in config["augmentation"].items() if k not in ("lsj", "drop_vanished")}
    meta = Meta(config, Classes(("cup",), (1,)), 3, {})
    read = Meta.from_json(meta.to_json()).config
    assert read["model"] == now["model"]
    assert read["compute"] == now["compute"]
    assert read["augmentation"].keys() == now["augmentation"].keys()
    assert not read["augmentation"]["strong_views"]


def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    set_before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == set_before
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "hpr_jax"))
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", set_before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
