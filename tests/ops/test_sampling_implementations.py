"""Deformable sampling and RoIAlign: every implementation that runs on this machine, against loops in float64.

On CPUs these are XLA and the interpreted kernels; with a GPU (`JAX_PLATFORMS=cuda`) also the compiled kernels, in more
shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from sampling_in_float64 import SHAPES, inputs, sample_in_float64

from hpr_jax.kernels import weighted_rows
from hpr_jax.ops.deformable_sampling import deformable_sampling
from hpr_jax.ops.roi_align import roi_align

ON_GPU = jax.default_backend() == "gpu"
IMPLEMENTATIONS = ("xla", "pallas_interpret", *(["pallas"] if ON_GPU else []))
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def output_and_gradients(implementation, shapes, value, locations, weights, gradient):
    def sample(*arguments):
        value, locations, weights = arguments
        return deformable_sampling(value, shapes, locations, weights, implementation=implementation)

    out, pullback = jax.vjp(sample, value, locations, weights)
    return out.reshape(gradient.shape), *pullback(gradient.reshape(out.shape))


def assert_agrees(implementation, shapes, *arrays):
    # Everything is computed in float32; only the results are rounded to the 8 bits of bfloat16.
    tolerance = 4e-3 if arrays[0].dtype == jnp.bfloat16 else 1e-5
    computed = output_and_gradients(implementation, shapes, *arrays)
    for name, ours, theirs in zip(
        ("output", "value", "locations", "weights"), computed, sample_in_float64(arrays[0], shapes, *arrays[1:])
    ):
        scale = np.abs(theirs).max() + 1e-6
        np.testing.assert_allclose(np.asarray(ours, np.float64) / scale, theirs / scale, atol=tolerance, err_msg=name)


CASES = {
    "typical": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "one of everything": {"shapes": ((1, 1),), "batch": 1, "queries": 1, "heads": 1, "width": 1, "points": 1},
    "ragged": {"shapes": ((3, 2), (7, 5)), "batch": 3, "queries": 7, "heads": 3, "width": 5, "points": 3},
    "wide": {"shapes": ((4, 6),), "batch": 1, "queries": 3, "width": 128},
    "more rows than a program has": {"batch": 1, "queries": 131, "heads": 1, "width": 8, "points": 1},
}


@implementations
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(implementation, case):
    settings = CASES[case]
    assert_agrees(implementation, settings.get("shapes", SHAPES), *inputs(np.random.default_rng(0), **settings))


@implementations
def test_borders_and_far_outside(implementation):
    """Places at pixel centres and at the edges of the map (both are kinks), and far out, where pixel numbers overflow."""
    value, locations, weights, gradient = inputs(np.random.default_rng(1), shapes=((4, 4),), queries=8, points=1)
    places = jnp.array([0.125, 0.375, -0.125, 1.125, 0.0, 1.0, 1e9, -1e30])
    locations = jnp.broadcast_to(places[None, :, None, None, None, None], locations.shape)
    assert_agrees(implementation, ((4, 4),), value, locations, weights, gradient)


@implementations
def test_locations_that_are_not_finite_are_outside(implementation):
    value, locations, weights, gradient = inputs(np.random.default_rng(1), queries=2)
    locations = locations.at[:, 0].set(jnp.nan).at[:, 1].set(jnp.inf)
    out, of_value, _, of_weights = output_and_gradients(implementation, SHAPES, value, locations, weights, gradient)
    assert not np.any(out)
    assert not np.any(of_value)
    assert not np.any(of_weights)


@implementations
def test_gradients_of_many_samples_at_one_place_add_up(implementation):
    value, locations, weights, gradient = inputs(np.random.default_rng(2), queries=40)
    assert_agrees(implementation, SHAPES, value, jnp.full_like(locations, 0.45), weights, gradient)


@implementations
@pytest.mark.parametrize("empty", ["batch", "queries", "points", "heads"])
def test_nothing_to_sample(implementation, empty):
    value, locations, weights, _ = inputs(np.random.default_rng(0), **{empty: 0})
    out = deformable_sampling(value, SHAPES, locations, weights, implementation=implementation)
    assert out.shape == (value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    assert not np.any(out)


@implementations
def test_fuzz(implementation):
    compiled = implementation != "pallas_interpret" and ON_GPU
    for seed in range(60 if compiled else 3):
        rng = np.random.default_rng(seed)
        shapes = tuple((int(h), int(w)) for h, w in rng.integers(1, 9, (rng.integers(1, 5), 2)))
        sizes = {
            name: int(rng.integers(1, most)) for name, most in (("batch", 4), ("queries", 40), ("heads", 5), ("points", 6))
        }
        width = int(rng.choice([1, 3, 8, 16, 24, 32, 64]))
        dtype = jnp.bfloat16 if rng.random() < 0.3 else jnp.float32
        assert_agrees(implementation, shapes, *inputs(rng, shapes=shapes, width=width, dtype=dtype, **sizes))


def loss(implementation, value, locations, weights):
    return jnp.sum(jnp.sin(deformable_sampling(value, SHAPES, locations, weights, implementation=implementation)))


@pytest.mark.parametrize("implementation", [None, "pallas" if ON_GPU else "pallas_interpret"])
@pytest.mark.parametrize("transformation", ["remat", "vmap", "vmap of one argument", "shard_map"])
def test_under_transformations(implementation, transformation):
    arrays = inputs(np.random.default_rng(3))[:3]
    gradients = jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2))
    if transformation == "remat":
        gradients = jax.grad(jax.checkpoint(functools.partial(loss, implementation)), argnums=(0, 1, 2))
    elif transformation == "vmap":
        gradients = functools.partial(_second_of_two, gradients)
    elif transformation == "vmap of one argument":
        gradients = functools.partial(_second_value_of_two, gradients)
    else:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        # The interpreter does not track what varies over an axis; kernels and XLA do.
        gradients = jax.shard_map(
            gradients,
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
            check_vma=implementation != "pallas_interpret",
        )
    expected = jax.grad(functools.partial(loss, "xla"), argnums=(0, 1, 2))(*arrays)
    for ours, theirs in zip(jax.jit(gradients)(*arrays), expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def _second_of_two(function, *arrays):
    return jax.tree.map(lambda x: x[1], jax.vmap(function)(*(jnp.stack([2 * x, x]) for x in arrays)))


def _second_value_of_two(function, value, *others):
    return jax.tree.map(lambda x: x[1], jax.vmap(function, (0, None, None))(jnp.stack([2 * value, value]), *others))


def test_chunks_change_nothing(monkeypatch):
    """The XLA implementations compute the same of 5 queries, or regions, at once and two at a time."""
    rng = np.random.default_rng(4)
    arrays = inputs(rng)[:3]
    features, sizes = jnp.asarray(rng.normal(size=(2, 150, 12)), jnp.float32), jnp.array([[[12, 10], [6, 5]]] * 2)
    corners = np.sort(rng.uniform(0, 90, (2, 5, 2, 2)), axis=2).reshape(2, 5, 4)

    def of_regions(features):
        shapes = ((12, 10), (6, 5))
        regions = roi_align(features, shapes, sizes, jnp.asarray(corners), strides=(8, 16), implementation="xla")
        return jnp.sum(jnp.sin(regions))

    def run():
        return (
            jax.value_and_grad(functools.partial(loss, "xla"), argnums=(0, 1, 2))(*arrays),
            jax.value_and_grad(of_regions)(features),
        )

    at_once = run()
    for module in ("deformable_sampling", "roi_align"):
        monkeypatch.setattr(f"hpr_jax.ops.{module}.CHUNK", 2)
    for one, other in zip(jax.tree.leaves(at_once), jax.tree.leaves(run())):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_refusals():
    value, locations, weights, _ = inputs(np.random.default_rng(0), width=130)
    with pytest.raises(ValueError, match="no implementation 'cuda'; choose one of xla, pallas"):
        deformable_sampling(value, SHAPES, locations, weights, implementation="cuda")
    with pytest.raises(ValueError, match=r"at most 128 channels, and these have 130; use 'xla'"):
        deformable_sampling(value, SHAPES, locations, weights, implementation="pallas_interpret")
    with pytest.raises(ValueError, match="differ in their batch"):
        deformable_sampling(value[:1], SHAPES, locations, weights)
    with pytest.raises(ValueError, match=r"weights \[B, Q, H, L, P\]"):
        deformable_sampling(value, SHAPES, locations, weights[..., 0])
    # If no implementation is named, XLA is taken.
    assert deformable_sampling(value, SHAPES, locations, weights).shape == (2, 5, 2 * 130)


@pytest.mark.skipif(ON_GPU, reason="kernels are refused on machines without a GPU alone")
def test_a_kernel_asked_for_without_a_gpu_raises():
    value, locations, weights, _ = inputs(np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and the default platform is cpu"):
        deformable_sampling(value, SHAPES, locations, weights, implementation="pallas")


@implementations
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_roi_align(implementation, dtype):
    """Regions of all levels, empty ones, and ones outside of the valid area, against the definition in float64; and bins of
    zeros behind the nine of each region, whose gradient does not count."""
    rng = np.random.default_rng(0)
    shapes, strides, bins, ratio = ((12, 10), (6, 5)), (8, 16), 3, 2
    features = jnp.asarray(rng.normal(size=(2, 150, 12)), dtype)
    sizes = jnp.array([[[12, 10], [6, 5]], [[9, 7], [5, 4]]])
    corners = np.sort(rng.uniform(-20, 100, (2, 6, 2, 2)), axis=2)
    boxes = np.concatenate([corners[:, :, 0], corners[:, :, 1]], axis=-1).astype(np.float32)
    boxes[0, 0], boxes[0, 1], boxes[1, 0] = (0, 0, 80, 96), (30, 30, 30, 30), (500, 500, 600, 600)
    gradient = jnp.asarray(rng.normal(size=(2, 6, 16, 12)), dtype)
    expected, of_features = np.zeros(gradient.shape), np.zeros(features.shape)
    wide = np.asarray(features, np.float64)
    for b, q in np.ndindex(2, 6):
        x0, y0, x1, y1 = boxes[b, q].astype(np.float64)
        level = int(np.clip(np.floor(np.log2(np.sqrt((x1 - x0) * (y1 - y0)) / 30 + 1e-6)), 0, 1))
        height, width = np.asarray(sizes[b, level])
        start = level * 120
        for bin_y, bin_x, i, j in np.ndindex(bins, bins, ratio, ratio):
            y = y0 / strides[level] - 0.5 + (y1 - y0) / strides[level] * (bin_y + (i + 0.5) / ratio) / bins
            x = x0 / strides[level] - 0.5 + (x1 - x0) / strides[level] * (bin_x + (j + 0.5) / ratio) / bins
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
            for row in {int(y), min(int(y) + 1, height - 1)}:
                for column in {int(x), min(int(x) + 1, width - 1)}:
                    weight = (1 - abs(y - row)) * (1 - abs(x - column)) / ratio**2
                    place = start + row * shapes[level][1] + column
                    expected[b, q, bin_y * bins + bin_x] += weight * wide[b, place]
                    of_features[b, place] += weight * np.asarray(gradient[b, q, bin_y * bins + bin_x], np.float64)

    def align(features, boxes=boxes):
        return roi_align(
            features,
            shapes,
            sizes,
            jnp.asarray(boxes),
            strides=strides,
            output_size=bins,
            sampling_ratio=ratio,
            finest_scale=30.0,
            multiple=8,
            implementation=implementation,
        )

    out, pullback = jax.vjp(jax.jit(align), features)
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance)
    np.testing.assert_allclose(
        np.asarray(pullback(gradient)[0], np.float64), of_features, atol=tolerance * np.abs(of_features).max()
    )
    # There may be no regions.
    assert align(features, np.zeros((2, 0, 4))).shape == (2, 0, 16, 12)


@pytest.mark.parametrize("channels", [3, 300])
def test_weighted_rows_of_odd_widths(channels):
    """Tables narrower and wider than the tile of a program, with rows that several sums share."""
    rng = np.random.default_rng(0)
    table, gradient = rng.normal(size=(7, channels)).astype(np.float32), rng.normal(size=(9, channels)).astype(np.float32)
    index, weights = rng.integers(0, 7, (9, 4)).astype(np.int32), rng.normal(size=(9, 4)).astype(np.float32)
    weights[0] = 0
    matrix = np.zeros((9, 7))
    np.add.at(matrix, (np.arange(9)[:, None], index), weights)
    out = weighted_rows.forward(*map(jnp.asarray, (table, index, weights)), interpret=not ON_GPU)
    np.testing.assert_allclose(out, matrix @ table, atol=1e-5)
    back = weighted_rows.backward(7, *map(jnp.asarray, (index, weights, gradient)), interpret=not ON_GPU)
    np.testing.assert_allclose(back, matrix.T @ gradient, atol=1e-5)
