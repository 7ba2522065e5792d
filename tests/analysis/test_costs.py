"""What a detector costs: counted FLOPs and parameters, static shapes, and what a compiled program takes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from hpr_jax.analysis.costs import (
    compiled_memory,
    evaluation_buckets,
    module_costs,
    photographs,
    static_shapes,
    total,
    training_buckets,
)
from hpr_jax.analysis.flops import inner_jaxprs, product_flops
from hpr_jax.config import load_config
from hpr_jax.inference.detect import make_detect
from hpr_jax.models.backbones.resnet import ResNet
from hpr_jax.models.backbones.swin import SwinTransformer
from hpr_jax.models.build import abstract_detector

SHAPE = (tiny.SIDE, tiny.SIDE)


def flops(function, *shapes):
    return product_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr)


def convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loop(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


@jax.custom_vjp
def custom(a, b):
    return a @ b


custom.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), [(2, 3, 5), (2, 4, 5)], 2 * 2 * 3 * 4 * 5),
        (convolution, [(2, 9, 8, 3), (3, 3, 3, 6)], 2 * 2 * 5 * 4 * 6 * 3 * 3 * 3),
        (loop, [(3, 5), (4, 5, 5)], 4 * 2 * 3 * 5 * 5),
        (jax.jit(jax.checkpoint(loop)), [(3, 5), (4, 5, 5)], 4 * 2 * 3 * 5 * 5),
        (custom, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x), [(3, 3)], 2 * 2 * 27),
        (lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), [(3, 3)], 2 * 27),
        (lambda a, b: jnp.exp(a) + b, [(3, 5), (3, 5)], 0),
    ],
)
def test_flops_of_known_functions(function, shapes, expected):
    assert flops(function, *shapes) == expected


@pytest.mark.parametrize(
    ("kind", "side", "multiply_adds", "parameters"),
    [
        # Torchvision's count is without the two statistics that BatchNorm has for each channel.
        (ResNet, 224, 4.09e9, 25_557_032 - 2049 * 1000 + 2 * 26_560),
        # The classifier has a norm for the last map alone, the backbone one for each of its four.
        (SwinTransformer, 384, 103.9e9, 196_735_516 - 1537 * 1000 + 2 * (192 + 384 + 768)),
    ],
)
def test_backbones_have_their_published_sizes(kind, side, multiply_adds, parameters):
    """Those of ResNet-50 and Swin-L, less the layer of 1000 classes, whose multiply-adds are few."""
    backbone = nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0)))
    inputs = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    counted = product_flops(jax.make_jaxpr(lambda m, *x: m(*x))(backbone, *inputs).jaxpr)
    assert counted / 2 == pytest.approx(multiply_adds, rel=2e-3)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(backbone))) == parameters


def config(merge_points):
    c = tiny.config()
    c.model.refiner.merge_points = merge_points
    return c


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)


@pytest.mark.parametrize("merge_points", [("attention", "ffn"), ("interaction",), ("attention",), ()])
def test_parts_sum_to_what_detections_depend_on(merge_points):
    c = config(merge_points)
    detector = abstract_detector(c.model, tiny.CLASSES)
    parts = module_costs(detector, SHAPE)
    graph, state = nnx.split(detector)
    inputs = jax.ShapeDtypeStruct((1, *SHAPE, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    jaxpr = jax.make_jaxpr(make_detect(graph, 10))(state, *inputs).jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert total(parts).flops == product_flops(needed)
    assert all(part.flops >= 0 for part in parts)
    refiner = next(part for part in parts if part.name == "refiner")
    inside = [part for part in parts if part.within == "refiner"]
    for field in ("trained", "frozen", "flops"):
        assert getattr(refiner, field) == sum(getattr(part, field) for part in inside)
    # The bodies of such loops count once, which would be too little if they had products.
    loops = [equation for equation in equations(needed) if equation.primitive.name == "while"]
    assert loops
    assert not any(product_flops(inner) for equation in loops for inner in inner_jaxprs(equation))


def test_parameters_are_those_of_the_detector():
    c = tiny.config()
    c.model.backbone.update(norm="frozen_batch", frozen_stages=1)
    detector = abstract_detector(c.model, tiny.CLASSES)
    sums = total(module_costs(detector, SHAPE))
    leaves = nnx.to_flat_state(nnx.state(detector))
    trained = sum(math.prod(v.shape) for _, v in leaves if isinstance(v, nnx.Param))
    assert sums.trained == trained
    assert sums.frozen == sum(math.prod(v.shape) for _, v in leaves) - trained
    assert 0 < sums.frozen < sums.trained


@pytest.mark.parametrize(
    ("model", "max_boxes", "queries"), [("ddq", 3, (8, 8, 12)), ("ddq", 9, (8, 18, 12)), ("deformable_detr", 9, (8, 0, 0))]
)
def test_static_shapes(model, max_boxes, queries):
    detector = abstract_detector(tiny.config(model=model).model, tiny.CLASSES)
    shapes = static_shapes(detector, SHAPE, max_boxes)
    assert shapes.levels == ((8, 8), (4, 4), (2, 2), (1, 1))
    assert shapes.tokens == 85
    assert (shapes.matching, shapes.denoising, shapes.dense) == queries
    shapes = static_shapes(detector, SHAPE)
    assert (shapes.matching, shapes.denoising, shapes.dense) == (8, 0, 0)


def test_buckets_hold_all_photographs():
    c = load_config(f"{tiny.ROOT}/configs/ddq.py")
    for buckets, count in ((evaluation_buckets(c), 6), (training_buckets(c), 12)):
        assert len(buckets) == count
        assert sum(buckets.values()) == pytest.approx(1)
        assert list(buckets) == sorted(buckets, key=np.prod)
    assert len(photographs()) == 1000
    assert len(photographs(1001)) >= 1001


def test_compiled_memory():
    function = jax.jit(lambda x, y: (x + 1, jnp.sort(y @ y) @ y), donate_argnums=0)
    x, y = jax.ShapeDtypeStruct((1000,), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    memory = compiled_memory(function.trace(x, y))
    # The result x + 1 takes the place of x; there may be a few bytes of pointers.
    assert 0 <= memory["results"] - 4 * 64 * 64 < 100
    assert memory["temporaries"] >= 4 * 64 * 64
