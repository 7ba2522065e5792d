"""Gradients of the operations that define their own, inside a `shard_map` that checks what varies over mesh axes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from hpr_jax.ops import attention as attention_module
from hpr_jax.ops.attention import attention
from hpr_jax.ops.convolution import convolution
from hpr_jax.ops.deformable_sampling import deformable_sampling
from hpr_jax.ops.layer_norm import normalized
from hpr_jax.ops.linear import affine
from hpr_jax.ops.roi_align import roi_align

SHAPES = ((3, 3), (2, 2))
# Functions, and the shapes of their arguments: the first argument is split over the devices, the others are the same on all.
CASES: dict[str, tuple[Callable[..., jax.Array], list[tuple[int, ...]]]] = {
    "affine": (affine, [(2, 3, 4), (4, 5), (5,)]),
    "affine without bias": (functools.partial(affine, bias=None), [(2, 3, 4), (4, 5)]),
    "normalized": (functools.partial(normalized, epsilon=1e-5), [(2, 3, 4), (4,), (4,)]),
    "convolution": (lambda x, kernel: convolution(x, kernel, 2, jnp.array([[5, 6]])), [(2, 5, 6, 3), (3, 3, 3, 4)]),
    "attention": (attention, [(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)]),
    "deformable_sampling": (
        lambda value, locations, weights: deformable_sampling(value, SHAPES, locations, weights),
        [(2, 13, 1, 4), (2, 3, 1, 2, 2, 2), (2, 3, 1, 2, 2)],
    ),
    "roi_align": (
        lambda boxes, features: roi_align(features, SHAPES, jnp.array([SHAPES] * 2), 20.0 * boxes, strides=(8, 16)),
        [(2, 3, 4), (2, 13, 4)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_what_is_the_same_on_all_devices(name, monkeypatch):
    # Attention computes one head after the other.
    monkeypatch.setattr(attention_module, "LARGE", 1)
    function, shapes = CASES[name]
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.uniform(0.1, 0.9, shape), jnp.float32) for shape in shapes]

    def loss(*arrays):
        return jnp.sum(jnp.sin(function(*arrays)))

    gradients = jax.grad(loss, argnums=tuple(range(len(arrays))))
    # A gradient that varies over a mesh axis by mistake is an error even if the axis has one device.
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("data"), *(PartitionSpec() for _ in arrays[1:]))
    split = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs))(*arrays)
    for ours, theirs in zip(split, gradients(*arrays)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
