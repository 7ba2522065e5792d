"""The kernels are lowered for CUDA at the sizes of the full detector, parsed, and compiled, on a machine without a GPU.

They are compiled where Triton's compiler is installed (`triton`, among the packages of the tests).
"""

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
from hpr_jax.models.build import abstract_detector
from hpr_jax.models.layers import Conv
from hpr_jax.ops.deformable_sampling import deformable_sampling as sampling_op

# Compiling for GPUs takes long.
pytestmark = pytest.mark.slow

# (height, width) of the levels of an 800x1333 image.
LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
TOKENS = sum(h * w for h, w in LEVELS)
HEADS, WIDTH, POINTS = 8, 32, 4
# Numbers of queries of the users of deformable sampling.
QUERIES = {"encoder": TOKENS, "decoder": 900}


FORWARD = functools.partial(deformable_sampling.forward, spatial_shapes=LEVELS)
BACKWARD = functools.partial(deformable_sampling.backward, spatial_shapes=LEVELS)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def sampling_arguments(batch, queries, dtype, width=WIDTH):
    places = (batch, queries, HEADS, len(LEVELS), POINTS)
    value, gradient = array(batch, TOKENS, HEADS, width, dtype=dtype), array(batch, queries, HEADS, width, dtype=dtype)
    return value, array(*places, 2), array(*places), gradient


@functools.cache
def kernels(user, dtype):
    """Triton code of the forward and the backward kernels at the sizes of their user: `regions` are RoIAlign's."""
    if user == "regions":
        rows, terms, table = 2 * 900 * 49, 16, 2 * TOKENS
        index, weights = array(rows, terms, dtype=jnp.int32), array(rows, terms)
        forward = cuda.triton_ir(weighted_rows.forward, array(table, 256, dtype=dtype), index, weights)
        backward = cuda.triton_ir(
            functools.partial(weighted_rows.backward, table), index, weights, array(rows, 256, dtype=dtype)
        )
    else:
        *arguments, gradient = sampling_arguments(2, QUERIES[user], dtype)
        forward, backward = cuda.triton_ir(FORWARD, *arguments), cuda.triton_ir(BACKWARD, *arguments, gradient)
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
    # Relaxed additions need no barriers.
    assert "tt.atomic_rmw fadd, relaxed" in code
    assert "acq_rel" not in code


@users
@types
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.skipif(not cuda.HAS_COMPILER, reason="the compiler (PyPI: triton) is not installed; it exists for Linux alone")
def test_compiled_code_spills_nothing(user, dtype, capability):
    for direction, code in kernels(user, dtype).items():
        (text,) = code.values()
        registers, spilled, ptx = cuda.compile_kernel(text, capability, num_warps=2)
        print(f"sm_{capability} {user} {dtype.__name__} {direction}: {registers} registers")
        assert spilled == 0, direction
        assert registers <= 128, direction
        assert "ld.global.v4" in ptx or direction == "backward"
        assert "atom." not in ptx
        if direction == "backward":
            assert ("red.global.gpu.relaxed.add.v4.f32" if capability >= 90 else "red.global.gpu.relaxed.add.f32") in ptx
        if capability >= 90:
            # Loops exchange nothing through shared memory.
            assert ptx.count("bar.sync") <= 1, direction


def test_offsets_beyond_32_bits():
    """A batch of 200 images has more values than 32-bit offsets can reach."""
    *arguments, gradient = sampling_arguments(200, 100, jnp.float32)
    assert math.prod(arguments[0].shape) * 4 > 2**32
    for code in (cuda.triton_ir(FORWARD, *arguments), cuda.triton_ir(BACKWARD, *arguments, gradient)):
        (text,) = code.values()
        assert re.search(r"tensor<\d+x32xi64>", text)


@pytest.mark.parametrize("width", [1, 24, 128])
def test_other_widths_are_read_by_triton(width):
    *arguments, gradient = sampling_arguments(1, 100, jnp.bfloat16, width)
    assert cuda.triton_ir(FORWARD, *arguments)
    assert cuda.triton_ir(BACKWARD, *arguments, gradient)


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
    graph, params, rest = tiny.split_parameters(abstract_detector(config.model, tiny.CLASSES))

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


def test_products_read_no_strided_slice():
    """XLA's GPU compiler of JAX 0.11.2 ends the process where it fuses one into a product."""
    conv = nnx.eval_shape(lambda: Conv(32, 64, 1, 2, rngs=nnx.Rngs(0)))
    text = jax.jit(lambda conv, x, sizes: conv(x, sizes)).trace(conv, array(1, 8, 8, 32), array(1, 2, dtype=jnp.int32))
    text = text.lower(lowering_platforms=("cuda",)).as_text()
    sliced, product = text.index("stablehlo.slice"), text.index("stablehlo.dot_general")
    assert "stablehlo.optimization_barrier" in text[sliced:product]
