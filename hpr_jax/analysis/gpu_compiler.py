"""Compiles programs for a GPU on a machine without one, by XLA's own compiler, and knows what such cards can do.

XLA takes the description of a card in place of the card. What needs the card itself is left out: nothing is tried out to
choose the fastest kernel, products are those of NVIDIA's library and none of XLA's own, and sorts take XLA's fallback.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from importlib.metadata import version

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from hpr_jax.analysis.compiled import CompiledProgram, Launch, read_program
from hpr_jax.analysis.flops import kernel_costs
from hpr_jax.analysis.programs import GRADIENTS, Traced
from hpr_jax.errors import UserError
from hpr_jax.ops.platform import programs_for
from hpr_jax.runtime.devices import data_mesh

# JAX versions whose public parts compile kernels for a GPU that is not there.
VERSIONS = "0.10."
# Options of XLA. Without a card nothing can be tried out, neither settings of kernels nor XLA's own products.
OPTIONS: dict[str, bool | int] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}
# JAX's setting of how many seconds a program must take to compile to be put on disk.
_LEAST_TO_CACHE = "jax_persistent_cache_min_compile_time_secs"
# The part of a card's memory that JAX takes by default; XLA_PYTHON_CLIENT_MEM_FRACTION changes it.
USABLE = 0.75


@dataclasses.dataclass(frozen=True)
class Card:
    """What a GPU can do, by its data sheet.

    Attributes:
      name: of the device.
      memory: bytes.
      bandwidth: bytes of its memory that it reads or writes in a second.
      rates: floating-point operations of products in a second, by the type of their operands, without sparsity.
      description: what XLA wants to know.
    """

    name: str
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    description: str

    def seconds(self, launch: Launch) -> float:
        """The least time that a launch takes: that of its bytes or that of its products."""
        rate = self.rates.get(launch.types[0], max(self.rates.values())) if launch.types else 1.0
        return launch.times * max(launch.bytes / self.bandwidth, launch.flops / rate)


_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  {details}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""


def _card(name: str, memory: int, bandwidth: float, rates: Mapping[str, float], details: str) -> Card:
    description = _DESCRIPTION.format(name=name, memory=memory, bandwidth=round(bandwidth), details=details)
    return Card(name, memory, bandwidth, rates, description)


CARDS = {
    "h100": _card(
        "NVIDIA H100 80GB HBM3",
        84_929_347_584,
        3.35e12,
        {"bf16": 989e12, "f16": 989e12, "tf32": 494e12, "f32": 67e12, "f64": 67e12},
        "core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800 shared_memory_per_core: 233472 "
        "shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }",
    ),
    "a100": _card(
        "NVIDIA A100-SXM4-80GB",
        84_974_239_744,
        2.04e12,
        {"bf16": 312e12, "f16": 312e12, "tf32": 156e12, "f32": 19.5e12, "f64": 19.5e12},
        "core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: 41943040 shared_memory_per_core: 167936 "
        "shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 }",
    ),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that was compiled for a card.

    Attributes:
      program: what it launches.
      arguments, results, inner: bytes of its arguments, of results that take no argument's place, and of inner values.
      peak: bytes on the card while it runs, with those arrays that it does not read.
    """

    program: CompiledProgram
    arguments: int
    results: int
    inner: int
    peak: int


def check_compiler() -> None:
    """Makes sure that programs can be compiled for GPUs.

    Raises:
      UserError: the packages are missing, or JAX has a version for which there is no public way.
    """
    # JAX's part, and the assembler of CUDA.
    if not has_package("jax_cuda12_plugin") or not has_package("nvidia.cuda_nvcc"):
        raise UserError(
            "Compiling for a GPU needs JAX's compiler for CUDA; install the extra gpu-compiler of this package: "
            'pip install "hpr_jax[gpu-compiler]".'
        )
    if not version("jax").startswith(VERSIONS):
        raise UserError(
            f"JAX {version('jax')} has no public way to compile kernels for a GPU that is not there; install JAX "
            f"{VERSIONS}* for --compile-for."
        )


def has_package(name: str) -> bool:
    """Whether a package is installed, like `nvidia.cuda_nvcc`."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@contextlib.contextmanager
def programs_of(card: Card) -> Iterator[Mesh]:
    """A context in which programs are traced for a card. It gives a mesh of that card, on which their arguments are to be.

    Raises:
      UserError: programs cannot be compiled for it here.
    """
    check_compiler()
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=card.description, topology="1x1x1"
        )
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"JAX cannot compile for a GPU here: {str(error).splitlines()[0]}.") from error
    # JAX cannot read such programs back from its cache on disk, and warns about each: none is put there.
    seconds = jax.config.values[_LEAST_TO_CACHE]
    jax.config.update(_LEAST_TO_CACHE, float("inf"))
    try:
        with programs_for("cuda"):
            yield data_mesh(described.devices)
    finally:
        jax.config.update(_LEAST_TO_CACHE, seconds)


def compile_traced(traced: Traced) -> Iterator[tuple[str, Compiled]]:
    """Compiles programs that were traced for a card, one after the other; gives the name of each and what it became."""
    lasting = sum(traced.lasting.values())
    for name, program in traced.programs.items():
        made = program.lower(lowering_platforms=("cuda",)).compile(compiler_options=OPTIONS)
        read = read_program(made.as_text() or "", kernel_costs(program.jaxpr.jaxpr))
        memory = made.memory_analysis()
        assert memory is not None, "XLA's GPU compiler plans the memory of every program"
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        present = lasting + sum(traced.passing[what] for what in traced.present[name])
        peak = present + results + memory.temp_size_in_bytes
        yield name, Compiled(read, memory.argument_size_in_bytes, results, memory.temp_size_in_bytes, peak)


def largest_batch(traced: Traced, compiled: Mapping[str, Compiled], images: int, card: Card) -> int:
    """How many images a batch can have on a card, by what a batch of `images` takes. All but parameters, their moments and
    gradients counts as growing with the batch, so that it may be some more."""
    fixed = sum(traced.lasting.values()) + traced.passing.get(GRADIENTS, 0)
    growing = max(one.peak for one in compiled.values()) - fixed
    return int(max(card.memory * USABLE - fixed, 0) * images // max(growing, 1))
