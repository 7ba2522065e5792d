"""What is read from the text of a compiled program: launches, bytes, products, and where they come from."""

import functools

import jax
import jax.numpy as jnp
import pytest

from hpr_jax.analysis.compiled import UNKNOWN_ROUNDS, read_program
from hpr_jax.analysis.flops import KernelCost, flops_by_scope, kernel_costs
from hpr_jax.analysis.scopes import scope_of
from hpr_jax.kernels import attention, deformable_sampling, weighted_rows

# A product of XLA's library with its workspace, which does not count.
PRODUCT = """\
  %product = (bf16[8,4]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", metadata={op_name=\
"jit(f)/jvp(encoder)/while/body/ffn/expand/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["DEFAULT"]}}}
"""


def program(*lines, computations=""):
    """A program with these instructions in front of its result `%x`."""
    entry = "\n".join(f"  {line.strip()}" for line in lines)
    return f"""HloModule jit_f

{computations}
ENTRY %main (x: bf16[8,16], w: bf16[16,4]) -> bf16[8,16] {{
  %x = bf16[8,16]{{1,0}} parameter(0), metadata={{op_name="x"}}
  %w = bf16[16,4]{{1,0}} parameter(1)
{entry}
  ROOT %result = bf16[8,16]{{1,0}} bitcast(%x)
}}
"""


def fusion(*lines, operands="%x", result="bf16[8,16]{1,0}"):
    """A program with one fusion, whose body has these lines."""
    body = "%body (p: bf16[8,16]) -> bf16[8,16] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"
    return program(f"%f = {result} fusion({operands}), kind=kLoop, calls=%body", computations=body)


def test_a_product():
    read = read_program(program(PRODUCT))
    (launch,) = read.launches
    assert launch.kind == "product"
    assert launch.bytes == 2 * (8 * 16 + 16 * 4 + 8 * 4)
    assert read.flops == {("bf16", "bf16", "bf16"): 2 * 8 * 16 * 4}
    assert launch.scope({"encoder", "ffn", "expand", "f"}) == ("encoder", "ffn", "expand")


@pytest.mark.parametrize(("precision", "operand"), [("DEFAULT", "tf32"), ("HIGHEST", "f32")])
def test_precision_of_float32_products(precision, operand):
    text = program(PRODUCT).replace("bf16", "f32").replace("DEFAULT", precision)
    assert list(read_program(text).flops) == [(operand, operand, "f32")]


# Of convolutions that take maps [2, 6, 6, 3] to [2, 4, 4, 5] by kernels of 3x3: the arrays that a launch reads and writes.
MAPS, KERNEL, RESULT = "bf16[2,6,6,3]{3,2,1,0}", "bf16[5,3,3,3]{3,2,1,0}", "bf16[2,4,4,5]{3,2,1,0}"


@pytest.mark.parametrize(
    ("target", "arrays"),
    [
        ("Forward", (MAPS, KERNEL, RESULT)),
        ("BackwardInput", (RESULT, KERNEL, MAPS)),
        ("BackwardFilter", (MAPS, RESULT, KERNEL)),
    ],
)
def test_convolutions_and_their_gradients_take_as_many_products(target, arrays):
    left, right, result = arrays
    read = read_program(
        program(
            f"%a = {left} parameter(2)",
            f"%b = {right} parameter(3)",
            f"%c = ({result}, u8[0]{{0}}) custom-call(%a, %b), window={{size=3x3}}, dim_labels=b01f_o01i->b01f, "
            f'custom_call_target="__cudnn$conv{target}"',
        )
    )
    assert sum(read.flops.values()) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert read.launches[0].kind == "convolution"
    assert read.bytes == 2 * (2 * 6 * 6 * 3 + 5 * 3 * 3 * 3 + 2 * 4 * 4 * 5)


@pytest.mark.parametrize(("count", "rounds", "guessed"), [('"known_trip_count":{"n":"6"}', 6, 0), ("", UNKNOWN_ROUNDS, 1)])
def test_loops_count_as_often_as_they_run(count, rounds, guessed):
    body = "%body (p: bf16[8,16]) -> bf16[8,16] {\n  %x = bf16[8,16] parameter(0)\n  %w = bf16[16,4] parameter(1)\n"
    loop = f"%loop = bf16[8,16] while(%x), condition=%until, body=%body, backend_config={{{count}}}"
    read = read_program(program(loop, computations=f"{body}{PRODUCT}}}\n"))
    assert (read.num_launches, read.bytes, read.guessed) == (rounds, rounds * 448, guessed)


@pytest.mark.parametrize("branches", ["branch_computations={%a, %b}", "true_computation=%a, false_computation=%b"])
def test_of_a_conditional_the_worst_branch_counts(branches):
    copies = {
        name: f"  %{name}1 = f32[{size}] parameter(0)\n  %{name}2 = f32[{size}] copy(%{name}1)\n" for name, size in SIZES
    }
    computations = "".join(f"%{name} (p: f32[1]) -> f32[1] {{\n{lines}}}\n" for name, lines in copies.items())
    read = read_program(program(f"%c = f32[] conditional(%x, %x, %x), {branches}", computations=computations))
    assert read.bytes == 2 * 4 * 100


SIZES = (("a", 10), ("b", 100))


@pytest.mark.parametrize(
    ("lines", "moved", "kind"),
    [
        # Read whole, and written in another type.
        (["ROOT %r = f32[8,16] convert(%p)"], 8 * 16 * (2 + 4), "bf16 to f32"),
        # Of an array that is sliced behind an operation on its elements, the slice is read.
        (["%n = bf16[8,16] negate(%p)", "ROOT %r = bf16[2,16] slice(%n), slice={[0:2]}"], 2 * 2 * 16 * 2, "elements"),
        # Read twice, but no more than the whole.
        (
            ["%a = bf16[6,16] slice(%p), slice={[0:6]}", "ROOT %r = bf16[14,16] concatenate(%p, %a)"],
            2 * (8 * 16 + 14 * 16),
            "copy",
        ),
        (["%c = bf16[] constant(0)", "ROOT %r = bf16[8,24] pad(%p, %c), padding=0_0x0_8"], 2 * 8 * (16 + 24), "pad"),
        (
            ["%c = f32[8,16] convert(%p)", "%z = f32[] constant(0)", "ROOT %r = f32[16] reduce(%c, %z)"],
            2 * 128 + 64,
            "reduce",
        ),
    ],
)
def test_fusions_move_what_their_results_are_made_of(lines, moved, kind):
    result = lines[-1].split(" = ")[1].split(" ")[0]
    (launch,) = read_program(fusion("%p = bf16[8,16] parameter(0)", *lines, result=result)).launches
    assert (launch.bytes, launch.kind) == (moved, kind)


def test_a_row_that_is_written_into_a_table_moves_alone():
    lines = ["%i = s32[] constant(3)", "%n = bf16[1,16] negate(%row)"]
    update = "ROOT %r = bf16[8,16] dynamic-update-slice({}, %n, %i, %i)"
    parameters = ["%p = bf16[8,16] parameter(0)", "%row = bf16[1,16] parameter(1)"]
    given = "%row = bf16[1,16] parameter(2)"
    in_place = fusion(*parameters, *lines, update.format("%p"), operands="%x, %row").replace("\n  %f", f"\n  {given}\n  %f")
    assert read_program(in_place).bytes == 2 * 16 * 2
    # A table that is made in the fusion is written whole.
    zeros = ["%z = bf16[] constant(0)", "%b = bf16[8,16] broadcast(%z)"]
    anew = fusion(*parameters, *lines, *zeros, update.format("%b"), operands="%x, %row").replace(
        "\n  %f", f"\n  {given}\n  %f"
    )
    assert read_program(anew).bytes == 16 * 2 + 8 * 16 * 2


def test_kernels_count_as_they_tell():
    call = (
        '%k = bf16[8,16] custom-call(%x, %w), custom_call_target="__gpu$xla.gpu.triton", '
        'metadata={op_name="jit(f)/refiner/regions/sum_rows/pallas_call"}'
    )
    (launch,) = read_program(program(call)).launches
    assert (launch.kind, launch.bytes, launch.flops) == ("kernel sum_rows", 2 * (8 * 16 + 16 * 4 + 8 * 16), 0)
    told = {("sum_rows", ("bf16[8,16]", "bf16[16,4]")): KernelCost(flops=77, bytes=1000)}
    read = read_program(program(call), told)
    assert (read.bytes, read.flops) == (1000, {("bf16",): 77})


def test_what_xla_has_put_in_belongs_to_what_reads_it():
    copy = "%copied = bf16[16,4] copy(%w)"
    read = read_program(program(copy, PRODUCT.replace("%w)", "%copied)")))
    assert [launch.scope({"ffn"}) for launch in read.launches] == [("ffn",), ("ffn",)]


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("jit(f)/encoder/dot_general", ("encoder",)),
        (
            "jit(heads)/transpose(jvp(encoder/layers))/while/body/closed_call/attention/dot_general",
            ("encoder", "layers", "attention"),
        ),
        ("transpose(jvp(encoder))/checkpoint/rematted_computation/encoder/layers/mul", ("encoder", "layers")),
        ("jit(f)/vmap()/add", ()),
        ("", ()),
    ],
)
def test_scopes_of_operations(path, scope):
    assert scope_of(path, {"encoder", "layers", "attention", "heads"}) == scope


def test_flops_by_scope():
    def function(x, weights):
        with jax.named_scope("encoder"):

            def step(x, weight):
                return jax.named_scope("ffn")(jnp.matmul)(x, weight), None

            x, _ = jax.lax.scan(jax.checkpoint(step), x, weights)
        return x @ x

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 4), (3, 4, 4))]
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    assert flops_by_scope(jaxpr, {"encoder", "ffn"}) == {("encoder", "ffn"): 3 * 2 * 4**3, (): 2 * 4**3}
    # With its gradient: three products for one, as the forward product is computed again.
    gradient = jax.make_jaxpr(jax.grad(lambda x, weights: jnp.sum(function(x, weights))))(*shapes).jaxpr
    assert flops_by_scope(gradient, {"encoder", "ffn"})["encoder", "ffn"] >= 2 * 3 * 2 * 4**3


@pytest.mark.parametrize(("kernel", "flops"), [("attention", 2 * (2 * 2 * 70 * 70 * 16)), ("rows", 0)])
def test_kernels_count_where_they_multiply_matrices(kernel, flops):
    """As XLA's implementations do, so that the count does not depend on which one is taken."""
    if kernel == "attention":
        function, arguments = functools.partial(attention.forward, masked=-1e30), (QUERIES, QUERIES, QUERIES, MASK)
    else:
        function, arguments = weighted_rows.forward, (TABLE, INDEX, SUMMED)
    jaxpr = jax.make_jaxpr(functools.partial(function, interpret=True))(*arguments).jaxpr
    assert flops_by_scope(jaxpr, ()).total() == flops


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


VALUE, LOCATIONS, WEIGHTS = (
    array(1, 20, 2, 8),
    array(1, 5, 2, 1, 4, 2, dtype=jnp.float32),
    array(1, 5, 2, 1, 4, dtype=jnp.float32),
)
TABLE, INDEX, SUMMED = array(30, 16), array(6, 4, dtype=jnp.int32), array(6, 4, dtype=jnp.float32)
QUERIES, MASK = array(1, 70, 2, 16), array(1, 70, 70, dtype=bool)


@pytest.mark.parametrize(
    ("kernel", "arguments", "flops", "moved"),
    [
        # 40 points of four rows of 8 channels; values and results in bfloat16.
        (
            functools.partial(deformable_sampling.forward, spatial_shapes=[(4, 5)], interpret=True),
            (VALUE, LOCATIONS, WEIGHTS),
            2 * 40 * 4 * 8,
            2 * 320 + 4 * (80 + 40) + 2 * 80,
        ),
        # The gradient of the table is read and written in float32.
        (
            functools.partial(deformable_sampling.backward, spatial_shapes=[(4, 5)], interpret=True),
            (VALUE, LOCATIONS, WEIGHTS, array(1, 5, 2, 8)),
            2 * 2 * 40 * 4 * 8,
            2 * 320 + 4 * (80 + 40) + 2 * 80 + 2 * 4 * 320 + 4 * (80 + 40),
        ),
        (
            functools.partial(weighted_rows.forward, interpret=True),
            (TABLE, INDEX, SUMMED),
            2 * 6 * 4 * 16,
            2 * 480 + 4 * 48 + 2 * 96,
        ),
        (
            functools.partial(attention.forward, masked=-1e30, interpret=True),
            (QUERIES, QUERIES, QUERIES, MASK),
            2 * (2 * 2 * 70 * 70 * 16),
            4 * 2 * 2240 + 4900 + 2 * 4 * 140,
        ),
    ],
)
def test_kernels_tell_what_they_move(kernel, arguments, flops, moved):
    ((_, cost),) = kernel_costs(jax.make_jaxpr(kernel)(*arguments).jaxpr).items()
    assert cost == KernelCost(flops, moved)
