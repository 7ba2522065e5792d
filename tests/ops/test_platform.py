"""Programs for a platform that the machine does not have."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from hpr_jax.ops.chunks import by_chunks
from hpr_jax.ops.dispatch import dispatch
from hpr_jax.ops.platform import programs_for, target_platform


def test_the_default_is_that_of_this_machine():
    assert target_platform() == jax.default_backend()
    for platform, backend in (("cpu", "cpu"), ("cuda", "gpu"), ("tpu", "tpu")):
        with programs_for(platform):
            assert target_platform() == backend
    assert target_platform() == jax.default_backend()


def code(platform, rows):
    """StableHLO of ten or more rows that a CPU computes by fours."""
    with programs_for(platform):
        function = jax.jit(lambda rows: by_chunks(lambda rows: rows + 1, 4, rows))
        return export.export(function, platforms=[platform])(rows).mlir_module()


def test_cpus_alone_get_chunks():
    rows = jax.ShapeDtypeStruct((10, 3), jnp.float32)
    assert "stablehlo.while" in code("cpu", rows)
    assert "stablehlo.while" not in code("cuda", rows)


def test_chunks_of_any_number_of_rows():
    (number,) = export.symbolic_shape("n")
    with programs_for("cpu"):
        function = jax.jit(lambda rows: by_chunks(lambda rows: rows + 1, 4, rows))
        exported = export.export(function, platforms=["cpu"])(jax.ShapeDtypeStruct((number, 3), jnp.float32))
    for count in (1, 4, 10):
        rows = jnp.arange(3.0 * count).reshape(count, 3)
        assert exported.call(rows).tolist() == (rows + 1).tolist()


def test_kernels_may_be_named_for_gpus():
    with programs_for("cuda"):
        chosen = dispatch("x", "pallas", lambda x: x, lambda x, interpret: interpret, jnp.zeros(1))
    assert chosen is False
    with programs_for("cpu"), pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        dispatch("x", "pallas", lambda x: x, lambda x, interpret: interpret, jnp.zeros(1))
