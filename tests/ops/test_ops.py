"""Operations against plain loops and hand-computed values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stubs import floats

from hpr_jax.kernels import nms as nms_kernel
from hpr_jax.ops import attention as attention_module
from hpr_jax.ops import nms
from hpr_jax.ops.attention import attention
from hpr_jax.ops.boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, iou, xyxy_to_cxcywh
from hpr_jax.ops.convolution import convolution
from hpr_jax.ops.deformable_sampling import deformable_sampling
from hpr_jax.ops.layer_norm import normalized
from hpr_jax.ops.linear import affine
from hpr_jax.ops.nms import nms_first, nms_mask
from hpr_jax.ops.order import compute_after
from hpr_jax.ops.padding import halve, valid_mask, zero_padding
from hpr_jax.ops.roi_align import roi_align

RNG = np.random.default_rng(0)


def test_overlaps_by_hand():
    a, b = jnp.array([0.0, 0.0, 2.0, 2.0]), jnp.array([1.0, 1.0, 3.0, 3.0])
    assert iou(a, b) == pytest.approx(1 / 7)
    # The enclosing box has area 9, of which 2 belong to neither.
    assert generalized_iou(a, b) == pytest.approx(1 / 7 - 2 / 9)
    assert generalized_iou(a, a) == pytest.approx(1.0)


def test_box_formats_are_inverse():
    boxes = jnp.asarray(RNG.uniform(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, atol=1e-6)


def test_inverse_sigmoid_clips():
    x = inverse_sigmoid(jnp.array([0.0, 0.5, 1.0, 2.0]), 1e-3)
    np.testing.assert_allclose(x, [np.log(1e-3), 0, np.log(1e3), np.log(1e3)], rtol=1e-5)


def test_padding():
    sizes = jnp.array([[2, 3], [4, 1]])
    mask = np.asarray(valid_mask(sizes, 4, 5))[..., 0]
    assert mask[0].sum() == 6
    assert mask[1].sum() == 4
    assert mask[0, :2, :3].all()
    assert np.asarray(zero_padding(jnp.ones((2, 4, 5, 1)), sizes)).sum() == 10
    np.testing.assert_array_equal(halve(jnp.array([1, 2, 3, 8])), [1, 1, 2, 4])


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize(("height", "width"), [(8, 9), (7, 6)])
def test_convolution_against_loops(height, width, size, stride):
    """Of two images, the second is smaller; what its padding holds does not matter."""
    x, kernel = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((2, height, width, 3), (size, size, 3, 4)))
    sizes = jnp.array([[height, width], [height - 3, width - 2]])
    inside = np.ones((2, height, width, 1), bool)
    inside[1, height - 3 :] = inside[1, :, width - 2 :] = False
    pad = size // 2

    def by_loops(x, kernel):
        x = jnp.pad(jnp.where(inside, x, 0), ((0, 0), (pad, pad), (pad, pad), (0, 0)))

        def pixel(row, column):
            return jnp.einsum("bhwi,hwio->bo", x[:, row : row + size, column : column + size], kernel)

        rows = [[pixel(row, column) for column in range(0, width, stride)] for row in range(0, height, stride)]
        return jnp.stack([jnp.stack(row, 1) for row in rows], 1)

    weights = jnp.asarray(RNG.normal(size=(2, -(-height // stride), -(-width // stride), 4)), jnp.bfloat16)

    def run(function, x):
        out, back = jax.vjp(function, x, kernel)
        return out, *back(weights.astype(out.dtype))

    ours = run(lambda x, kernel: convolution(x, kernel, stride, sizes), x)
    for a, b in zip(ours, run(by_loops, x)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    rounded = run(lambda x, kernel: convolution(x, kernel, stride, sizes), x.astype(jnp.bfloat16))
    assert [array.dtype for array in rounded] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(rounded, ours):
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(b)


@pytest.mark.parametrize("seen", ["all", "some keys", "some pairs", "some pairs of all images"])
def test_attention_head_by_head(seen, monkeypatch):
    rng = np.random.default_rng(0)
    # The values are far from zero, so that the gradients of queries and keys are small differences.
    arrays = (rng.normal(mean, size=(2, n, 3, 4)) for n, mean in ((5, 0), (7, 0), (7, 20), (5, 0)))
    # The numbers are rounded to bfloat16, so that they are the same in both types.
    query, key, value, weights = (jnp.asarray(array, jnp.bfloat16).astype(jnp.float32) for array in arrays)
    mask: jax.Array | None = None
    if seen != "all":
        shape = {"some keys": (2, 1, 7), "some pairs": (2, 5, 7), "some pairs of all images": (1, 5, 7)}[seen]
        may_see = rng.random(shape) < 0.5
        # A query, or all queries of an image, may see no key.
        may_see[0, 0] = False
        mask = jnp.asarray(may_see)

    def run(*arguments, implementation=None):
        out, back = jax.vjp(functools.partial(attention, mask=mask, implementation=implementation), *arguments)
        return out, *back(weights.astype(out.dtype))

    together = run(query, key, value)
    monkeypatch.setattr(attention_module, "LARGE", 1)
    apart = run(query, key, value)
    assert "custom_vjp_call" in str(jax.make_jaxpr(lambda: attention(query, key, value, mask))())
    for a, b in zip(apart, together):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for implementation in ("xla", "pallas_interpret"):
        rounded = run(*(x.astype(jnp.bfloat16) for x in (query, key, value)), implementation=implementation)
        for a, b in zip(rounded, together):
            assert a.dtype == jnp.bfloat16
            assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(b)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="only programs for CPUs are put into an order")
@pytest.mark.parametrize("other", [1.0, np.inf, np.nan])
def test_compute_after_makes_a_dependency_and_changes_nothing(other):
    x = jnp.asarray(RNG.normal(size=(3, 2)), jnp.bfloat16)
    waited = jax.jit(compute_after)(jnp.full((4, 5), other), x)
    assert waited.dtype == x.dtype
    # That NaN arrives shows that the compiler did not remove the dependency.
    expected = np.full(x.shape, np.nan) if np.isnan(other) else x.astype(jnp.float32)
    np.testing.assert_array_equal(waited.astype(jnp.float32), expected)


def bilinear(level, x, y):
    """Value of map `[h, w, D]` at pixel coordinates, zero outside."""
    height, width, channels = level.shape
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    out = np.zeros(channels)
    for column in (x0, x0 + 1):
        for row in (y0, y0 + 1):
            if 0 <= column < width and 0 <= row < height:
                out += (1 - abs(x - column)) * (1 - abs(y - row)) * level[row, column]
    return out


def test_deformable_sampling_against_loops():
    shapes, batch, heads, width, queries, points = ((3, 5), (2, 2)), 2, 2, 3, 4, 3
    tokens = sum(h * w for h, w in shapes)
    value = RNG.normal(size=(batch, tokens, heads, width))
    # Well inside, at the borders, outside, and far outside.
    locations = RNG.uniform(-0.6, 1.6, (batch, queries, heads, len(shapes), points, 2))
    locations[0, 0, 0] = 0.0
    locations[0, 1, 0] = 1.0
    locations[0, 2, 0] = 7.0
    weights = RNG.normal(size=locations.shape[:-1])
    expected = np.zeros((batch, queries, heads, width))
    for b, q, h in np.ndindex(batch, queries, heads):
        start = 0
        for level, (rows, columns) in enumerate(shapes):
            table = value[b, start : start + rows * columns, h].reshape(rows, columns, width)
            for p in range(points):
                x, y = locations[b, q, h, level, p] * (columns, rows) - 0.5
                expected[b, q, h] += weights[b, q, h, level, p] * bilinear(table, x, y)
            start += rows * columns
    arguments = (jnp.asarray(a, jnp.float32) for a in (locations, weights))
    out = deformable_sampling(jnp.asarray(value, jnp.float32), shapes, *arguments)
    np.testing.assert_allclose(out, expected.reshape(batch, queries, -1), atol=1e-5)


def test_deformable_sampling_refuses():
    value, locations, weights = jnp.zeros((1, 4, 1, 2)), jnp.zeros((1, 1, 1, 1, 1, 2)), jnp.zeros((1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="cuda"):
        deformable_sampling(value, ((2, 2),), locations, weights, implementation="cuda")
    with pytest.raises(ValueError, match="4 tokens"):
        deformable_sampling(value, ((2, 3),), locations, weights)


def test_roi_align_of_a_ramp_is_the_bin_centre():
    """On a map whose value is its x coordinate, a bin's average is its centre (in pixels of the level)."""
    shapes = ((16, 16), (8, 8))
    ramp = [np.broadcast_to(np.arange(w, dtype=np.float32), (h, w)) for h, w in shapes]
    features = jnp.asarray(np.concatenate([r.ravel() for r in ramp]))[None, :, None]
    boxes = jnp.array([[[16.0, 16.0, 48.0, 48.0], [8.0, 8.0, 124.0, 124.0]]])
    sizes = jnp.array([shapes])
    out = roi_align(features, shapes, sizes, boxes, strides=(8, 16), output_size=2, sampling_ratio=2)
    # 32 pixels: level 0 at stride 8, x from 1.5 to 5.5; 116 pixels: level 1 at stride 16, x from 0 to 7.25.
    np.testing.assert_allclose(out[0, 0, :, 0], [2.5, 4.5, 2.5, 4.5], rtol=1e-6)
    np.testing.assert_allclose(out[0, 1, :, 0], [1.8125, 5.4375, 1.8125, 5.4375], rtol=1e-5)


def test_roi_align_stops_at_the_valid_area():
    shapes, full, valid = ((8, 8),), jnp.array([[[8, 8]]]), jnp.array([[[5, 6]]])
    features = jnp.asarray(RNG.normal(size=(1, 64, 3)), jnp.float32)
    cropped = features.reshape(1, 8, 8, 3)[:, :5, :6].reshape(1, 30, 3)
    boxes = jnp.array([[[20.0, 10.0, 60.0, 52.0], [-30.0, -20.0, 90.0, 90.0]]])
    out = roi_align(features, shapes, valid, boxes, strides=(8,))
    np.testing.assert_allclose(out, roi_align(cropped, ((5, 6),), valid, boxes, strides=(8,)), atol=1e-6)
    assert np.abs(out - roi_align(features, shapes, full, boxes, strides=(8,))).max() > 0.1


def test_roi_align_takes_the_level_of_a_box_by_its_area():
    """Four levels of an image of 512 x 512, each filled with its number; a sample is a box's centre."""
    shapes = tuple((512 // stride,) * 2 for stride in (8, 16, 32, 64))
    numbers = jnp.concatenate([jnp.full(h * w, float(level)) for level, (h, w) in enumerate(shapes)])[None, :, None]
    levels = {
        (0, 0, 0, 0): 0,
        (0, 0, 20, 20): 0,
        (0, 0, 111.9, 112): 0,
        # The ratio to the finest scale counts 1e-6 more than it is.
        (0, 0, 111.99995, 112): 1,
        (0, 0, 56, 224): 1,
        (0, 0, 223.9, 224): 1,
        (0, 0, 224, 224): 2,
        (0, 0, 448, 448): 3,
        (0, 0, 1000, 1000): 3,
        # 230 pixels wide; boxes are not clipped.
        (-100, -100, 130, 130): 2,
    }
    align = jax.jit(lambda boxes: roi_align(numbers, shapes, jnp.array([shapes]), boxes, output_size=1, sampling_ratio=1))
    assert np.asarray(align(floats([[*levels]])))[0, :, 0, 0].tolist() == [*levels.values()]


def test_roi_align_counts_samples_beyond_the_border_as_zero():
    """On a map of ones: the middles of the four quarters are at -3, -1, 1 and 3 pixels from the corner of the first pixel,
    so that two of them are more than a pixel away from its middle."""
    box = floats([[[-32, 8, 32, 16]]])
    align = jax.jit(lambda boxes: roi_align(jnp.ones((1, 64, 1)), ((8, 8),), jnp.array([[[8, 8]]]), boxes, output_size=2))
    # In each row of bins the first has its samples outside, the second inside.
    np.testing.assert_allclose(align(box)[0, 0, :, 0], [0, 1, 0, 1], atol=1e-6)


def greedy(boxes, scores, candidates, threshold):
    """Textbook NMS: indices of the survivors by falling score."""
    survivors: list[int] = []
    for i in sorted(np.flatnonzero(candidates), key=lambda i: (-scores[i], i)):
        if all(float(iou(jnp.asarray(boxes[k]), jnp.asarray(boxes[i]))) <= threshold for k in survivors):
            survivors.append(int(i))
    return survivors


@pytest.mark.parametrize("stride", [8, 16, 32, 64])
def test_roi_align_reaches_the_end_of_the_map(stride):
    # The box (1, 1, 1, 1) of a border token lies half outside: of its 14 samples along an axis, the eighth is at 14, the end
    # of a map of 14, which counts as inside in the official code. 40 boxes, since XLA rounds differently for one.
    features, sizes = jnp.ones((1, 14 * 14, 1)), jnp.array([[[14, 14]]])
    boxes = jnp.broadcast_to(jnp.array([0.5, 0.5, 1.5, 1.5]) * 14 * stride, (1, 40, 4))
    aligned = jax.jit(lambda boxes: roi_align(features, ((14, 14),), sizes, boxes, strides=(stride,)))
    out = np.asarray(aligned(boxes)).reshape(40, 7, 7)
    assert np.all(out[:, :4, :4] == 1)
    assert not out[:, 4:].any()
    assert not out[:, :, 4:].any()


# Implementations of NMS that run on any machine.
nms_implementations = pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])


@nms_implementations
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_nms_is_greedy(threshold, implementation):
    center, side = RNG.uniform(0, 4, (24, 2)), RNG.uniform(0.5, 3, (24, 2))
    boxes = np.concatenate([center - side / 2, center + side / 2], axis=-1).astype(np.float32)
    scores = RNG.choice([0.1, 0.2, 0.3, 0.4], 24).astype(np.float32)
    candidates = RNG.random(24) < 0.8
    expected = greedy(boxes, scores, candidates, threshold)
    arrays = (jnp.asarray(boxes), jnp.asarray(scores), jnp.asarray(candidates))
    index, found = map(np.asarray, nms_first(*arrays, 24, threshold, implementation=implementation))
    assert index[found].tolist() == expected
    assert not index[~found].any()
    survive = nms_mask(*arrays, threshold, implementation=implementation)
    assert np.flatnonzero(survive).tolist() == sorted(expected)
    few, _ = nms_first(*arrays, 3, threshold, implementation=implementation)
    assert few.tolist() == expected[:3]


@nms_implementations
def test_nms_of_boxes_in_several_blocks(monkeypatch, implementation):
    """A survivor of the first block suppresses a box of the second one."""
    monkeypatch.setattr(nms, "BLOCK", 2)
    monkeypatch.setattr(nms_kernel, "BLOCK", 2)
    box, other, far = [0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 3.0, 3.0], [5.0, 5.0, 6.0, 6.0]
    boxes, scores = jnp.array([box, other, box, far, other]), jnp.array([0.9, 0.8, 0.7, 0.6, 0.5])
    index, found = nms_first(boxes, scores, jnp.ones(5, bool), 4, 0.5, implementation=implementation)
    assert index[found].tolist() == [0, 1, 3]


@nms_implementations
def test_nms_of_one_chain(implementation):
    """Each of 150 boxes suppresses the next one, which would suppress the one after it."""
    left = np.arange(150.0)
    boxes = floats(np.stack([left, 0 * left, left + 2, 0 * left + 1], axis=-1))
    candidates = np.ones(150, bool)
    index, found = nms_first(boxes, floats(-left), candidates, 100, 0.3, implementation=implementation)
    assert index[found].tolist() == list(range(0, 150, 2))
    assert found.sum() == 75
    survive = nms_mask(boxes, floats(-left), candidates, 0.3, implementation=implementation)
    assert np.flatnonzero(survive).tolist() == list(range(0, 150, 2))


def test_nms_suppresses_above_the_threshold_alone():
    """The second box has IoU 0.5 with the first; among equal scores the lower index survives."""
    boxes, everything = floats([[0, 0, 1, 1], [0, 0, 2, 1], [0, 0, 1, 1]]), np.ones(3, bool)
    first, mask = (jax.jit(function, static_argnums=numbers) for function, numbers in ((nms_first, (3, 4)), (nms_mask, 3)))
    for scores, threshold, expected in (
        ([0.5, 0.4, 0.5], 0.5, [0, 1]),
        ([0.5, 0.4, 0.5], 0.49, [0]),
        ([0.5, 0.5, 0.5], 0.49, [0]),
        ([0.4, 0.5, 0.4], 0.5, [1, 0]),
        ([0.4, 0.4, 0.5], 0.5, [2, 1]),
    ):
        index, found = first(boxes, floats(scores), everything, 3, threshold)
        assert index[found].tolist() == expected
        assert np.flatnonzero(mask(boxes, floats(scores), everything, threshold)).tolist() == sorted(expected)


@nms_implementations
def test_nms_of_nothing(implementation):
    boxes, scores, nothing = jnp.zeros((3, 4)), jnp.zeros(3), jnp.zeros(3, bool)
    index, found = nms_first(boxes, scores, nothing, 2, 0.5, implementation=implementation)
    assert not found.any()
    assert not index.any()
    assert not nms_mask(boxes, scores, nothing, 0.5, implementation=implementation).any()


@nms_implementations
def test_empty_boxes_do_not_suppress_one_another(implementation):
    boxes, scores, everything = jnp.zeros((3, 4)), jnp.array([0.1, 0.3, 0.2]), jnp.ones(3, bool)
    index, found = nms_first(boxes, scores, everything, 3, 0.5, implementation=implementation)
    assert index.tolist() == [1, 2, 0]
    assert found.all()
    assert nms_mask(boxes, scores, everything, 0.5, implementation=implementation).all()


def test_sampling_gradients_are_finite_far_outside():
    value = jnp.ones((1, 4, 1, 2))
    locations, weights = jnp.full((1, 1, 1, 1, 1, 2), 1e6), jnp.ones((1, 1, 1, 1, 1))
    gradients = jax.grad(lambda *a: deformable_sampling(a[0], ((2, 2),), *a[1:]).sum(), (0, 1, 2))(value, locations, weights)
    assert all(np.all(np.asarray(g) == 0) for g in gradients)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3)])
def test_gradients_of_linear_layers(inputs, outputs, with_bias):
    rng = np.random.default_rng(0)
    shapes = (2, 4, inputs), (inputs, outputs), (outputs,)
    x, kernel, *biases = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    bias = biases[0] if with_bias else None

    def plain(x, kernel, bias):
        return x @ kernel + (0 if bias is None else bias)

    def run(function, x):
        # Cubed, so that each result has a different gradient.
        return jax.value_and_grad(lambda *arguments: jnp.sum(function(*arguments) ** 3), argnums=(0, 1, 2))(x, kernel, bias)

    for ours, theirs in zip(*map(jax.tree.leaves, (run(affine, x), run(plain, x)))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    _, (of_x, *of_parameters) = run(affine, x.astype(jnp.bfloat16))
    assert of_x.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(of_parameters))


def test_layer_normalisation_computes_in_float32():
    """The mean of these numbers is so large that bfloat16 would lose what they differ by."""
    x = jnp.asarray(256.0 + 2.0 * np.arange(8), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / exact.std()
    found = normalized(x, jnp.ones(8), jnp.zeros(8), 1e-5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8)


def test_gradients_of_layer_normalisation():
    rng = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(rng.normal(loc=2.0, size=s), jnp.float32) for s in ((2, 4, 6), (6,), (6,)))

    def plain(x, scale, bias):
        centered = x - jnp.mean(x, axis=-1, keepdims=True)
        return centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5) * scale + bias

    def run(function, x):
        # Cubed, so that each result has a different gradient.
        return jax.value_and_grad(lambda *arguments: jnp.sum(function(*arguments) ** 3), argnums=(0, 1, 2))(x, scale, bias)

    ours = functools.partial(normalized, epsilon=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (run(ours, x), run(plain, x)))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    rounded = x.astype(jnp.bfloat16)
    _, gradients = run(ours, rounded)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for a, b in zip(gradients, run(ours, rounded.astype(jnp.float32))[1]):
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(b)
