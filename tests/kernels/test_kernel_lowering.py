"""The kernels as CUDA sees them, on a machine without a GPU: lowered at real sizes, parsed, and compiled where the compiler
is installed (`triton`, among the packages of the tests)."""

import functools
import math
import re

import cuda
import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from hpr_jax.kernels import deformable_sampling, weighted_rows
from hpr_jax.models.build import build_detector
from hpr_jax.ops.deformable_sampling import deformable_sampling as sampling_op

# Of an 800x1333 image.
LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
TOKENS = sum(h * w for h, w in LEVELS)
HEADS, WIDTH, POINTS = 8, 32, 4
QUERIES = {"encoder": TOKENS, "decoder": 900}


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def sampling_arguments(batch, queries, dtype, width=WIDTH):
    places = (batch, queries, HEADS, len(LEVELS), POINTS)
    value, gradient = array(batch, TOKENS, HEADS, width, dtype=dtype), array(batch, queries, HEADS, width, dtype=dtype)
    return value, array(*places, 2), array(*places), gradient


@functools.cache
def kernels(user, dtype):
    """Triton code of the kernels at the sizes of their user."""
    if user == "regions":
        rows, terms, table = 2 * 900 * 49, 16, 2 * TOKENS
        index, weights = array(rows, terms, dtype=jnp.int32), array(rows, terms)
        forward = cuda.triton_ir(weighted_rows.forward, array(table, 256, dtype=dtype), index, weights)
        backward = cuda.triton_ir(
            functools.partial(weighted_rows.backward, table), index, weights, array(rows, 256, dtype=dtype)
        )
    else:
        *arguments, gradient = sampling_arguments(2, QUERIES[user], dtype)
        forward = cuda.triton_ir(lambda *a: deformable_sampling.forward(*a, LEVELS), *arguments)
        backward = cuda.triton_ir(lambda *a: deformable_sampling.backward(*a, LEVELS), *arguments, gradient)
    return {"forward": forward, "backward": backward}


users = pytest.mark.parametrize("user", ["encoder", "decoder", "regions"])
types = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])


@users
@types
def test_lowered_code_is_read_by_triton(user, dtype):
    forward, backward = kernels(user, dtype)["forward"], kernels(user, dtype)["backward"]
    assert len(forward) == len(backward) == 1
    (code,) = forward.values()
    assert "tt.load" in code
    assert "atomic" not in code
    (code,) = backward.values()
    # One barrier after another, were they not relaxed.
    assert "tt.atomic_rmw fadd, relaxed" in code
    assert "acq_rel" not in code


@users
@types
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.skipif(not cuda.HAS_COMPILER, reason="the compiler (PyPI: triton) is not installed; it exists for Linux alone")
def test_compiled_code_spills_nothing(user, dtype, capability):
    for direction, code in kernels(user, dtype).items():
        compiled = cuda.compile_kernel(*code.values(), capability, num_warps=2)
        print(f"sm_{capability} {user} {dtype.__name__} {direction}: {compiled['registers']} registers")
        assert compiled["spilled"] == 0, direction
        assert compiled["registers"] <= 128, direction
        ptx = compiled["ptx"]
        assert "ld.global.v4" in ptx or direction == "backward"
        assert "atom." not in ptx
        if direction == "backward":
            assert ("red.global.gpu.relaxed.add.v4.f32" if capability >= 90 else "red.global.gpu.relaxed.add.f32") in ptx
        if capability >= 90:
            # Nothing goes through shared memory inside the loops.
            assert ptx.count("bar.sync") <= 1, direction


def test_offsets_beyond_32_bits():
    """More values than 32-bit offsets reach: a batch of 200 images."""
    *arguments, gradient = sampling_arguments(200, 100, jnp.float32)
    assert math.prod(arguments[0].shape) * 4 > 2**32
    for code in (
        cuda.triton_ir(lambda *a: deformable_sampling.forward(*a, LEVELS), *arguments),
        cuda.triton_ir(lambda *a: deformable_sampling.backward(*a, LEVELS), *arguments, gradient),
    ):
        (text,) = code.values()
        assert re.search(r"tensor<\d+x32xi64>", text)


@pytest.mark.parametrize("width", [1, 24, 128])
def test_other_widths_are_read_by_triton(width):
    *arguments, gradient = sampling_arguments(1, 100, jnp.bfloat16, width)
    assert cuda.triton_ir(lambda *a: deformable_sampling.forward(*a, LEVELS), *arguments)
    assert cuda.triton_ir(lambda *a: deformable_sampling.backward(*a, LEVELS), *arguments, gradient)


def test_vmapped_and_rematerialised_code_is_read_by_triton():
    *arguments, _ = sampling_arguments(1, 50, jnp.bfloat16)
    arguments = [array(3, *a.shape, dtype=a.dtype) for a in arguments]

    @jax.checkpoint
    def loss(value, locations, weights):
        return jnp.sum(jnp.square(sampling_op(value, LEVELS, locations, weights).astype(jnp.float32)))

    names = cuda.triton_ir(jax.vmap(jax.grad(loss, (0, 1, 2))), *arguments)
    assert sum("forward" in name for name in names) == 1
    assert sum("backward" in name for name in names) == 1


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_detector_takes_the_kernels_on_gpus_alone(train):
    config = tiny.config()
    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: build_detector(config.model, tiny.CLASSES, rngs=nnx.Rngs(0))), nnx.Param, ...
    )

    def run(params, rest, images, sizes):
        outputs = nnx.merge(graph, params, rest)(images, sizes)
        return sum(jnp.sum(x) for x in (outputs.primary.matching.logits, outputs.primary.matching.boxes))

    function = jax.grad(run) if train else run
    arguments = (params, rest, array(2, 64, 64, 3), array(2, 2, dtype=jnp.int32))
    names = list(cuda.triton_ir(function, *arguments))
    directions = ("forward", "backward") if train else ("forward",)
    for kernel in ("deformable_sampling", "weighted_rows"):
        for direction in ("forward", "backward"):
            assert any(f"{kernel}_{direction}" in name for name in names) == (direction in directions)
    assert "triton" not in jax.jit(function).lower(*arguments).as_text()
