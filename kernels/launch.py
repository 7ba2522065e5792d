"""What all kernels share: launch settings, and the call of the Triton backend in every supported JAX version."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hpr_jax.kernels.manual_axes import vary_alike


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the rows of a table are spread over threads.

    Attributes:
      num_warps: number of warps (of 32 threads) of a program.
      elements: number of neighbouring channels of a row that one thread handles, a power of two.
    """

    num_warps: int
    elements: int

    def block(self, width: int) -> int:
        """Number of rows, of `width` channels each, that a program works on; a power of two."""
        return max(32 * self.num_warps * self.elements // power_of_two(width), 1)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`. Triton knows no other sizes."""
    return 1 << max(n - 1, 0).bit_length()


def zeros_after(array: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """float32 zeros that a kernel adds to, and the array unchanged. They are made no earlier than the array: XLA would make
    those of all layers at once, and keep them in memory until they are used."""
    zero, array = jax.lax.optimization_barrier((jnp.zeros((), jnp.float32), array))
    return jnp.broadcast_to(zero, shape), array


def pallas_call(
    kernel: Callable[..., None],
    *,
    out_shape: Sequence[tuple[tuple[int, ...], jax.typing.DTypeLike]],
    grid: tuple[int, ...],
    launch: Launch,
    interpret: bool,
    name: str,
    flops: int = 0,
    input_output_aliases: Mapping[int, int] | None = None,
) -> Callable[..., list[jax.Array]]:
    """`pl.pallas_call` of a kernel that sees all of each array.

    Under `shard_map` the results vary over the axes that any argument varies over.

    The kernel tells JAX what it costs. Of device memory it reads each argument and writes each result once: rows that
    several programs read, or add to, come from the cache, which holds the tables of several images.

    Args:
      out_shape: shape and type of each result.
      grid: number of programs along each axis.
      interpret: whether the kernel is interpreted, on any platform, instead of compiled.
      name: of the kernel, in lowered programs.
      flops: twice the multiply-adds of its products and weighted sums. Where they depend on data, 0.
      input_output_aliases: argument that is overwritten -> result that takes its place.
    """

    def call(*arrays: jax.Array) -> list[jax.Array]:
        arguments = vary_alike(*arrays)
        kind = jax.typeof(arguments[0]).manual_axis_type
        results = [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in out_shape]
        every: list[jax.Array | jax.ShapeDtypeStruct] = [*arguments, *results]
        moved = sum(array.size * array.dtype.itemsize for array in every)
        return pl.pallas_call(
            kernel,
            out_shape=results,
            grid=grid,
            input_output_aliases=input_output_aliases or {},
            # Names the Triton backend, which is not the default of every JAX version.
            compiler_params=plt.CompilerParams(num_warps=launch.num_warps, num_stages=1),
            cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
            interpret=interpret,
            name=name,
        )(*arguments)

    return call
