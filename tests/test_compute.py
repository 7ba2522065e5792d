"""How a detector computes: types, rematerialisation, implementations, kept programs; none of it changes what is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.checkpoint import Meta
from hpr_jax.compilation_cache import enable_compilation_cache
from hpr_jax.config import to_plain
from hpr_jax.data.coco import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import Compute, build_detector

IMAGES = np.random.default_rng(0).normal(size=(2, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)
SIZES = jnp.array([[60, 50], [64, 64]])


def computing(model="ddq", **compute):
    """The tiny detector of the other tests, with other compute settings; or another model of the same kind, random."""
    config = tiny.config(model=model)
    make = functools.partial(build_detector, config.model, tiny.CLASSES, compute={**config.compute, **compute})
    detector = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    if model == "ddq":
        nnx.update(detector, nnx.state(tiny.detector()))
        return detector
    return make(rngs=nnx.Rngs(0))


def gradients(detector):
    graph, params, rest = nnx.split(detector, nnx.Param, ...)

    @jax.jit
    def run(params):
        outputs = nnx.merge(graph, params, rest)(jnp.asarray(IMAGES), SIZES, train=True)
        kept = outputs.primary.matching, *(branch.matching for branch in outputs.branches.values())
        return sum(jnp.sum(jnp.square(x.logits)) + jnp.sum(x.boxes) for x in kept)

    return jax.value_and_grad(run)(params)


def test_rematerialisation_changes_no_gradient():
    (stored, a), (computed, b) = (gradients(computing(remat=parts)) for parts in ((), ("backbone", "encoder", "refiner")))
    np.testing.assert_allclose(stored, computed, rtol=1e-5)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=1e-4 * scale)


@pytest.mark.parametrize("model", ["ddq", "dino"])
def test_bfloat16_lies_between_images_and_heads(model):
    outputs = jax.eval_shape(
        lambda d: d(jnp.asarray(IMAGES), SIZES, train=True), nnx.eval_shape(lambda: computing(model, dtype="bfloat16"))
    )
    inner = outputs.intermediates
    for name in ("memory", "initial_content", "hidden", "normed", "branch_hidden", "branch_normed"):
        assert getattr(inner, name).dtype == jnp.bfloat16, name
    assert inner.reference_boxes.dtype == jnp.float32
    for branch in (outputs.primary, *outputs.branches.values()):
        assert (branch.matching.logits.dtype, branch.matching.boxes.dtype) == (jnp.float32, jnp.float32)


def products(jaxpr, found):
    """Types of the inputs of every matrix product and convolution, also inside loops and branches."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append((equation.invars[0].aval.dtype, equation.outvars[0].aval.size))
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                item = getattr(item, "jaxpr", item)
                if hasattr(item, "eqns"):
                    products(item, found)
    return found


def test_bfloat16_is_what_most_products_are_of():
    detector = computing(dtype="bfloat16")
    jaxpr = jax.make_jaxpr(lambda d, x: d.neck(*d.backbone(x, SIZES))[0])(detector, jnp.asarray(IMAGES, jnp.bfloat16))
    assert {dtype for dtype, _ in products(jaxpr.jaxpr, [])} == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_is_close_and_its_gradients_are_float32():
    (exact, _), (rounded, gradient) = gradients(computing()), gradients(computing(dtype="bfloat16"))
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


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="with a GPU, kernels run")
def test_kernels_without_a_gpu():
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and JAX has found only the platform cpu; set it to 'auto'"):
        Compute(operations="pallas")


def test_checkpoints_from_before_the_section():
    """Rematerialisation was a part of their models' configs, and they knew no strong views."""
    config = to_plain(tiny.config())
    now = dict(config)
    compute = config.pop("compute")
    config["model"] = {**config["model"], "remat": True, "backbone": {**config["model"]["backbone"], "remat": False}}
    config["augmentation"] = {k: v for k, v in config["augmentation"].items() if k not in ("lsj", "drop_vanished")}
    meta = Meta(config, Classes(("cup",), (1,)), 3, {})
    read = Meta.from_json(meta.to_json()).config
    assert read["model"] == now["model"]
    assert {**read["compute"], "remat": list(read["compute"]["remat"])} == compute
    assert read["augmentation"].keys() == now["augmentation"].keys()


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
    finally:
        jax.config.update("jax_compilation_cache_dir", set_before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
