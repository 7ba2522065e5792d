"""Translations of JAX's operations to ONNX: ONNX Runtime computes what JAX does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hpr_jax.ops.grid_sample import grid_sample
from hpr_jax.ops.nms import nms_first, nms_mask
from hpr_jax.ops.platform import programs_for

pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(3, 4)).astype(np.float32)
POSITIVE = np.abs(ROWS) + 0.5
WHOLE = np.array([[3, -5, 7, 0], [-8, 2, -1, 6], [5, 5, -7, 1]], np.int32)
TRUTHS = WHOLE > 1
CUBE = RNG.normal(size=(2, 3, 4)).astype(np.float32)
MAP = RNG.normal(size=(2, 6, 7, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 3, 3, 4)).astype(np.float32)
PLACES = np.array([[2, 0], [1, 2]], np.int32)
BOXES = np.concatenate([low := RNG.uniform(0, 8, (2, 40, 2)), low + RNG.uniform(1, 4, (2, 40, 2))], -1).astype(np.float32)
# Coarse numbers have equals.
SCORES = np.round(RNG.uniform(size=(2, 40)), 1).astype(np.float32)


def as_model(function, arrays, weights=None):
    """The model of a function of arrays that returns one array, or several as a tuple or list."""
    from hpr_jax.inference.onnx.model import onnx_model

    def named(weights, *inputs):
        results = function(*inputs) if weights == {} else function(weights, *inputs)
        results = results if isinstance(results, tuple | list) else (results,)
        return {f"result {number}": result for number, result in enumerate(results)}

    inputs = {f"input {number}": jax.ShapeDtypeStruct(one.shape, one.dtype) for number, one in enumerate(arrays)}
    with programs_for("onnx"):
        return onnx_model(named, weights or {}, inputs)


def run(model, arrays):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"input {number}": np.asarray(one) for number, one in enumerate(arrays)})


def check(function, *arrays):
    """Compares what ONNX Runtime makes of a function with what JAX makes of it."""
    expected = jax.jit(lambda *inputs: function(*inputs))(*arrays)
    expected = expected if isinstance(expected, tuple | list) else (expected,)
    for found, right in zip(run(as_model(function, arrays), arrays), expected, strict=True):
        assert found.dtype == right.dtype
        np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-6)


ELEMENTWISE = {
    "arithmetic": (lambda x, y: ((x + y) * x - y) / (jnp.maximum(y, 2) + jnp.minimum(x, 0) ** 2), ROWS, POSITIVE),
    "functions": (lambda x: (jnp.exp(x), jnp.sin(x), jnp.cos(x), jnp.tanh(x), jax.nn.sigmoid(x), jnp.sign(x)), ROWS),
    "errors": (lambda x: (lax.erf(x), lax.erfc(x), jax.nn.gelu(x, approximate=False), jax.nn.gelu(x)), ROWS),
    "roots": (lambda x: (jnp.sqrt(x), lax.rsqrt(x), jnp.log(x), jnp.log1p(x), jnp.expm1(x), lax.exp2(x)), POSITIVE),
    "powers": (lambda x: (x**3, jnp.square(x), lax.integer_pow(x, -2), x**1.5, jnp.power(2.0, x)), POSITIVE),
    "rounding": (lambda x: (jnp.floor(x * 3), jnp.ceil(x * 3), jnp.round(x * 2), jnp.clip(x, -0.5, 0.5), abs(x)), ROWS),
    "halves": (lambda x: jnp.round(x / 2), WHOLE.astype(np.float32)),
    "integers": (lambda x: (x // 3, x % 3, lax.rem(x, jnp.int32(3)), x >> 2, -x, lax.div(x, jnp.int32(2))), WHOLE),
    "bits": (lambda x: (x & 6, x | 1, x ^ 3, ~x), WHOLE),
    "comparisons": (lambda x, y: (x < y, x <= y, x > y, x >= y, x == y, x != y), WHOLE, WHOLE[::-1].copy()),
    "truths": (lambda x: (x & ~x[:1], x | x[1:2], x ^ x[2:], jnp.where(x, x[::-1], x[:1])), TRUTHS),
    "conversions": (lambda x: ((x * 5).astype(jnp.int32), (x > 0).astype(jnp.float32), x.astype(bool)), ROWS),
    "bytes": (lambda x: (jnp.where(x > 9, x, jnp.uint8(7)), x.astype(jnp.float32)), np.arange(20, dtype=np.uint8)),
    "finite": (lambda x: jnp.isfinite(jnp.array([1.0, 0, -1, 1])[None] / x), WHOLE.astype(np.float32)),
    "choices": (lambda x, t: (jnp.where(t, x, 0), jnp.where(x > 1, 1, x)), WHOLE, TRUTHS),
}
SHAPES = {
    "repeated": (lambda x: jnp.broadcast_to(x[:, None], (3, 5, 4)).reshape(15, 4) + jnp.arange(4), ROWS),
    "repeated_reshapes": (lambda x: jnp.broadcast_to(x[:, :1], (3, 4))[:, None].reshape(1, 3, 4, 1) * 2, ROWS),
    "sums_of_repeated": (lambda x: jnp.sum(jnp.broadcast_to(x[:, None], (3, 5, 4)), axis=1), ROWS),
    "transposed": (lambda x: (x.transpose(2, 0, 1), x.swapaxes(0, 1).reshape(6, 4)), CUBE),
    "sliced": (lambda x: (x[:, 1:, ::2], x[1], x[..., -1], x[:, ::-1]), CUBE),
    "nothing": (lambda x: jnp.concatenate([x, x[:0], jnp.broadcast_to(x[:1], (0, 4))]), ROWS),
    "joined": (lambda x: (jnp.concatenate([x, x[:, :1], x[:, ::-1]], axis=1), jnp.stack([x, x + 1], axis=1)), CUBE),
    "split": (lambda x: tuple(jnp.split(x, [1, 3], axis=2)), CUBE),
    "padded": (lambda x: (jnp.pad(x, ((1, 2), (0, 1))), jnp.pad(x, ((0, 0), (2, 0)), mode="edge"), jnp.roll(x, 1, 1)), ROWS),
    "taken_away": (lambda x: lax.pad(x, 2.0, ((-1, 3, 0), (1, -2, 0))), ROWS),
    "truths_padded": (lambda x: jnp.pad(x, ((0, 1), (1, 0)), constant_values=True), TRUTHS),
    "counted": (lambda x: x + jnp.arange(3.0)[:, None] * lax.broadcasted_iota(jnp.float32, (3, 4), 1), ROWS),
    "constants": (lambda x: x * np.array([1, 2, 3, 4], np.float32).reshape(2, 2).T.reshape(4), ROWS),
}
REDUCTIONS = {
    "sums": (lambda x: (x.sum(), x.sum(1), x.mean((0, 2)), x.max(-1), x.min(0), x.prod(2)), CUBE),
    "of_truths": (lambda x: (x.any(1), x.all(0), x.any(), x.sum(0), jnp.argmax(x, 1), jnp.cumsum(x, 1)), TRUTHS),
    "extremes": (lambda x: (jnp.argmax(x, 1), jnp.argmin(x, 0)), WHOLE),
    "running": (lambda x: (jnp.cumsum(x, 1), lax.cumsum(x, 0, reverse=True)), ROWS),
    "largest": (lambda x: lax.top_k(x, 7), SCORES),
    "sorted": (lambda x: lax.sort((-x, lax.broadcasted_iota(jnp.int32, (2, 40), 1)), num_keys=1, is_stable=True), SCORES),
    "softmax": (lambda x: jax.nn.softmax(x, axis=1), CUBE),
    "pooled": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))),
        MAP,
    ),
}
PRODUCTS = {
    "matrices": (lambda x, y: (x @ y, x[0] @ y, x @ y[:, 0]), ROWS, ROWS.T.copy()),
    "stacks": (
        lambda x, y: (x @ y, jnp.einsum("bij,bkj->bik", x, x), jnp.einsum("bij,ik->bjk", x, x[0])),
        CUBE,
        ROWS.T.copy(),
    ),
    "several_axes": (lambda x, y: jnp.einsum("bhwc,hwcd->bd", x[:, :3, :3], y), MAP, KERNEL),
    "outer": (lambda x: jnp.einsum("i,j->ij", x[0], x[1]), ROWS),
    "attention": (lambda x: jax.nn.dot_product_attention(x, x, x[..., ::-1]), MAP),
    "convolution": (
        lambda x, y: lax.conv_general_dilated(
            x, y, (2, 1), ((1, 1), (2, 0)), rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        MAP,
        KERNEL,
    ),
    "groups": (
        lambda x, y: lax.conv_general_dilated(
            x, y[:, :, :1, :3], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
        ),
        MAP,
        KERNEL,
    ),
}
PLACED = {
    "rows": (lambda x, i: (x[i], x[:, i], x[i, i]), ROWS, PLACES),
    "along_an_axis": (lambda x, i: jnp.take_along_axis(x, i[:, :, None], axis=1), CUBE, PLACES),
    "each_its_own": (lambda x, i: jax.vmap(lambda x, i: x[i])(x, i), CUBE, PLACES),
    "each_its_second": (lambda x, i: jax.vmap(lambda x, i: x[:, i], in_axes=(0, 1), out_axes=1)(x, i), CUBE, PLACES),
    "outside_is_nan": (lambda x, i: x.at[i * 2 - 1].get(mode="fill", wrap_negative_indices=False), ROWS, PLACES),
    "outside_is": (lambda x, i: x.at[i * 2].get(mode="fill", fill_value=7), WHOLE, PLACES),
    "outside_is_true": (lambda x, i: x.at[i * 2].get(mode="fill", fill_value=True), TRUTHS, PLACES),
    "outside_is_clipped": (lambda x, i: x.at[i * 3 - 2].get(mode="clip", wrap_negative_indices=False), ROWS, PLACES),
    "windows": (lambda x, i: jax.vmap(lambda x, i: lax.dynamic_slice(x, (i[0], i[1]), (2, 3)))(x, i), CUBE, PLACES),
    "a_window": (
        lambda x, i: (lax.dynamic_slice(x, (i[0, 0], 0), (2, 4)), lax.dynamic_slice(x, (0, i[0, 0]), (1, 3))),
        ROWS,
        PLACES,
    ),
    "whole_windows": (
        lambda x, i: lax.gather(x, i, lax.GatherDimensionNumbers((1, 2), (), (0, 1)), (2, 4), mode="clip"),
        ROWS,
        PLACES,
    ),
    "written": (lambda x, i: x.at[i].set(5.0), ROWS, np.array([2, 0], np.int32)),
    "written_or_dropped": (lambda x, i: x.at[i].set(x[:2] * 2, mode="drop"), ROWS, np.array([9, 1], np.int32)),
    "truths_written": (lambda x, i: jnp.zeros(4, bool).at[i].set(True, mode="drop"), TRUTHS, np.array([9, 1], np.int32)),
    "columns_written": (lambda x, i: x.at[:, i].set(x[:, :2], mode="drop"), ROWS, np.array([3, 0], np.int32)),
    "each_written": (lambda x, i: jax.vmap(lambda x, i: x.at[i].set(-x[:2]))(x, i), CUBE, PLACES),
    "added": (lambda x, i: x.at[i].add(x[:2]), ROWS, np.array([1, 1], np.int32)),
}
LOOPS = {
    "rows": (lambda x: lax.scan(lambda total, row: (total + row, total * 2), x[0], x), ROWS),
    "backwards": (lambda x: lax.scan(lambda total, row: (total + row, total * 2), x[0], x, reverse=True), ROWS),
    "mapped": (lambda x: lax.map(lambda row: row @ x, x @ x.T), ROWS.T.copy()),
    "rounds": (lambda x: lax.fori_loop(0, 5, lambda i, y: y * 0.5 + i, x), ROWS),
    "so_many_rounds": (lambda x: lax.scan(lambda y, _: (y * 0.5 + 1, None), x, length=5)[0], ROWS),
    "until": (lambda x: lax.while_loop(lambda y: y.sum() < 100, lambda y: y * 2, x), POSITIVE),
    "each_until": (lambda x: jax.vmap(lambda y: lax.while_loop(lambda y: y.sum() < 100, lambda y: y * 2, y))(x), POSITIVE),
    "one_in_another": (
        lambda x: lax.map(lambda row: lax.while_loop(lambda y: y.sum() < 9, lambda y: y + x[0] ** 2, row), x),
        POSITIVE,
    ),
    "branches": (
        lambda x: tuple(lax.cond(x[i, 0] > 0, lambda y: y * 2, lambda y: y[:1] + 0 * y, x) for i in range(3)),
        ROWS,
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "elementwise": ELEMENTWISE,
    "shapes": SHAPES,
    "reductions": REDUCTIONS,
    "products": PRODUCTS,
    "places": PLACED,
    "loops": LOOPS,
}
CASES = {f"{kind}-{name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_operations(name):
    function, *arrays = CASES[name]
    check(function, *arrays)


def test_non_maximum_suppression():
    """With equal scores, of which the first is the better one."""

    def first(boxes, scores):
        return jax.vmap(lambda boxes, scores: nms_first(boxes, scores, scores > 0.2, 12, 0.3, implementation="xla"))(
            boxes, scores
        )

    check(first, BOXES, SCORES)
    check(lambda boxes, scores: nms_mask(boxes[0], scores[0], scores[0] > 0.2, 0.3, implementation="xla"), BOXES, SCORES)


def test_sampling_is_one_operation():
    grid = RNG.uniform(-1.3, 1.3, (2, 5, 3, 2)).astype(np.float32)
    check(grid_sample, MAP.transpose(0, 3, 1, 2).copy(), grid)
    model = as_model(grid_sample, (MAP.transpose(0, 3, 1, 2), grid))
    assert [node.op_type for node in model.graph.node] == ["GridSample", "Identity"]


class TestGraphs:
    def operators(self, model):
        return sorted(node.op_type for node in model.graph.node if node.op_type != "Identity")

    def test_what_is_repeated_is_not_stored(self):
        model = as_model(lambda x: x * jnp.broadcast_to(x[:, :1], (3, 4)) + jnp.broadcast_to(x.sum(0), (3, 4)), (ROWS,))
        assert self.operators(model) == ["Add", "Mul", "ReduceSum", "Reshape", "Slice"]

    def test_nothing_is_computed_twice_or_for_nothing(self):
        model = as_model(lambda x: (jnp.exp(x) + jnp.exp(x), jnp.sin(x) * 2)[0], (ROWS,))
        assert self.operators(model) == ["Add", "Exp"]

    def test_what_does_not_depend_on_a_loop_is_computed_before_it(self):
        model = as_model(lambda x: lax.map(lambda row: row + jnp.exp(x), x), (ROWS.T[:3, :3],))
        (loop,) = (node for node in model.graph.node if node.op_type == "Scan")
        (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
        assert [node.op_type for node in body.node] == ["Reshape", "Add", "Identity"]

    def test_layers_find_their_weights_as_constants(self):
        weights = {"layers.kernel": RNG.normal(size=(2, 4, 4)).astype(np.float32)}

        def layers(weights, x):
            return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, weights["layers.kernel"])[0]

        model = as_model(layers, (ROWS,), weights)
        assert self.operators(model) == ["MatMul", "MatMul", "Tanh", "Tanh"]
        assert {one.name for one in model.graph.initializer} == {"layers.kernel[0]", "layers.kernel[1]"}
        (found,) = run(model, (ROWS,))
        np.testing.assert_allclose(found, layers(weights, ROWS), atol=1e-6)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda x: lax.cumprod(x), "the operation cumprod of JAX has no translation"),
        (lambda x: lax.map(jnp.linalg.inv, x[None, :3, :3]), "has no translation"),
        (lambda x: lax.pad(x, 0.0, ((0, 0, 1), (0, 0, 0))), "pad of JAX puts numbers between"),
    ],
)
def test_unknown_operations_are_named(function, sentence):
    from hpr_jax.inference.onnx.table import UntranslatableError

    with pytest.raises(UntranslatableError, match=sentence):
        as_model(function, (ROWS,))
