"""Programs compiled for GPUs on a machine without one, by the extra gpu-compiler."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding

from hpr_jax.analysis.compiled import CompiledProgram, Launch
from hpr_jax.analysis.gpu_compiler import CARDS, Compiled, compile_traced, has_package, largest_batch, programs_of
from hpr_jax.analysis.programs import Traced
from hpr_jax.commands import describe
from hpr_jax.kernels import weighted_rows
from hpr_jax.runtime.absent_gpu import only_compiles
from hpr_jax.runtime.devices import EVERYWHERE

HAS_COMPILER = has_package("jax_cuda12_plugin") and has_package("nvidia.cuda_nvcc") and jax.__version__.startswith("0.10.")
needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="the extra gpu-compiler is not installed (scripts/test --all does); it is for JAX 0.10 on Linux"
)


def test_the_command_knows_all_cards():
    assert set(describe.CARDS) == set(CARDS)


def test_the_least_time_of_a_launch():
    def seconds(moved, flops, *types):
        return CARDS["a100"].seconds(Launch("", "", 2, moved, flops, types, "", ""))

    assert seconds(2.04e9, 0) == pytest.approx(2e-3)
    assert seconds(2.04e9, 312e9, "bf16", "bf16", "f32") == pytest.approx(2e-3)
    assert seconds(2.04e9, 624e9, "bf16", "bf16", "f32") == pytest.approx(4e-3)
    assert seconds(2.04e9, 624e9, "tf32", "tf32", "f32") == pytest.approx(8e-3)


def test_the_largest_batch():
    gigabyte = 10**9
    traced = Traced({}, {"parameters": 2 * gigabyte}, {"gradients": 1 * gigabyte, "batch": 5}, {})

    def compiled(peak):
        return Compiled(CompiledProgram(()), 0, 0, 0, peak)

    # Three quarters of 84.97 GB less 3 GB, in steps of 5 GB for two images.
    assert largest_batch(traced, {"a": compiled(4 * gigabyte), "b": compiled(8 * gigabyte)}, 2, CARDS["a100"]) == 24
    assert largest_batch(traced, {"a": compiled(500 * gigabyte)}, 2, CARDS["a100"]) == 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("card", CARDS)
def test_small_programs_do_what_they_must(card):
    """A product, a kernel and a loop with known answers."""

    def function(x, w, index, weights):
        with jax.named_scope("product"):
            y = x @ w
        with jax.named_scope("kernel"):
            rows = weighted_rows.forward(y, index, weights)
        with jax.named_scope("loop"):
            return jax.lax.scan(lambda z, _: (z @ z, None), rows, length=5)[0]

    with programs_of(CARDS[card]) as mesh:
        sharding = NamedSharding(mesh, EVERYWHERE)

        def array(*shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        arguments = array(512, 256), array(256, 128), array(128, 4, dtype=jnp.int32), array(128, 4, dtype=jnp.float32)
        traced = jax.jit(function).trace(*arguments)
        ((_, made),) = compile_traced(Traced({"f": traced}, {"parameters": 7}, {"batch": 5}, {"f": ("batch",)}))
    parts = made.program.grouped(lambda launch: launch.scope({"product", "kernel", "loop"}))
    product, kernel, loop = (parts[name,] for name in ("product", "kernel", "loop"))
    assert (product.num_launches, product.bytes) == (1, 2 * (512 * 256 + 256 * 128 + 512 * 128))
    assert (kernel.num_launches, kernel.bytes) == (1, 2 * 512 * 128 + 8 * 128 * 4 + 2 * 128 * 128)
    assert sum(kernel.flops.values()) == 2 * 128 * 4 * 128
    products = [launch for launch in loop.launches if launch.kind == "product"]
    assert sum(launch.times for launch in products) == 5
    assert made.program.flops["bf16", "bf16", "bf16"] == 2 * (512 * 256 * 128 + 5 * 128**3)
    assert made.arguments == 2 * (512 * 256 + 256 * 128) + 8 * 128 * 4
    assert made.peak == 7 + 5 + made.results + made.inner


@pytest.mark.slow
@needs_compiler
def test_all_programs_of_a_detector_compile_for_a_gpu(tmp_path):
    """As a command of its own: XLA ends the process at some of what it cannot compile."""
    file = tiny.write_config(
        tmp_path / "config.py",
        Path("nowhere"),
        "compute.update(operations='auto', dtype='bfloat16')",
        "model.backbone.update(norm='frozen_batch', frozen_stages=4)",
    )
    command = [sys.executable, "-m", "hpr_jax.main", "describe", "--config", str(file), "--compile-for", "h100"]
    done = subprocess.run(
        [*command, "--classes", "3", "--objects", "4", "--rows", "99"],
        capture_output=True,
        text=True,
        env=tiny.process_environment(),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("program "))
    rows = {line[:14].strip(): int(line[14:].split()[0].replace(",", "")) for line in lines[start + 1 : start + 8]}
    assert list(rows) == ["inference", "forward", "matching", "loss", "backward", "update", "training step"]
    assert rows["training step"] == sum(list(rows.values())[1:-1]) > rows["inference"] > 0
    kernels = {line.split()[1] for line in lines if line.startswith("kernel ")}
    assert kernels >= {
        "assignment",
        "deformable_sampling_forward",
        "deformable_sampling_backward",
        "nms",
        "weighted_rows_forward",
        "weighted_rows_backward",
    }
    assert any(line.startswith("refiner/layers/primary/interaction") for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not only_compiles(), reason="JAX's packages for GPUs are not installed, or there is a GPU")
def test_commands_are_silent_about_gpus(tmp_path):
    environment = tiny.process_environment()
    environment.pop("JAX_PLATFORMS", None)
    code = "from hpr_jax.commands.start import start; start(); import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("cpu\n", "")
