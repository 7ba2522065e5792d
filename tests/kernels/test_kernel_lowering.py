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

from hpr_jax.kernels import assignment, attention, deformable_sampling, nms, weighted_rows
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


# Kernels of which one program has many threads that exchange values: a function, and its arguments at full size.
HEADS_OF_QUERIES = array(4, 950, HEADS, WIDTH, dtype=jnp.bfloat16)
OF_QUERIES = array(4, HEADS, 950)
EXCHANGING = {
    "assignment": (
        assignment.solve,
        (array(19, 4, 100, 900), array(19, 4, 900, dtype=bool), array(4, dtype=jnp.int32), array(19, dtype=jnp.int32)),
    ),
    "assignment of all proposals": (
        assignment.solve,
        (array(1, 4, 100, TOKENS), array(1, 4, TOKENS, dtype=bool), array(4, dtype=jnp.int32), array(1, dtype=jnp.int32)),
    ),
    "nms": (functools.partial(nms.survivors, count=900, threshold=0.8), (array(TOKENS, 4), array(dtype=jnp.int32))),
    "attention forward": (
        functools.partial(attention.forward, masked=-1e30),
        (*(HEADS_OF_QUERIES,) * 3, array(4, 950, 950, dtype=bool)),
    ),
    "attention backward": (
        functools.partial(attention.backward, masked=-1e30),
        (*(HEADS_OF_QUERIES,) * 3, array(4, 950, 950, dtype=bool), OF_QUERIES, OF_QUERIES, HEADS_OF_QUERIES),
    ),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", EXCHANGING)
@pytest.mark.skipif(not cuda.HAS_COMPILER, reason="the compiler (PyPI: triton) is not installed; it exists for Linux alone")
def test_kernels_whose_threads_exchange_values_compile(name, capability):
    function, arguments = EXCHANGING[name]
    codes = cuda.triton_ir(function, *arguments)
    assert len(codes) == (2 if name == "attention backward" else 1)
    for kernel, code in codes.items():
        warps = {"assignment": 8, "assignment of all proposals": 32, "nms": 16}.get(name, 4)
        registers, spilled, ptx = cuda.compile_kernel(code, capability, warps)
        print(f"sm_{capability} {name} {kernel}: {registers} registers, {spilled} bytes spilled")
        # One program that holds something of every proposal has more than fits in registers.
        assert spilled == 0 or name == "assignment of all proposals"
        assert ("wgmma" in ptx or "mma.sync" in ptx) == name.startswith("attention"), "products are the tensor cores' work"
        # The search adds costs in float64.
        assert ("add.f64" in ptx or "add.rn.f64" in ptx) == name.startswith("assignment")


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
