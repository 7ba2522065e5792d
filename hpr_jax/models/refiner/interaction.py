"""The interface of an interaction, the part of a refiner that looks at the image, and what interactions share."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import flax.struct
import jax
from flax import nnx

from hpr_jax.models.layers import saved
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.ops.chunks import by_chunks

# Number of queries per chunk, chosen so that a chunk's regions, and the kernels generated for them, fit a CPU's cache.
CHUNK = 128


@flax.struct.dataclass
class Surroundings:
    """What the interactions of a layer look at besides the queries.

    Attributes:
      memory: the encoder's output.
      reference_boxes: normalised cxcywh `[B, Q, 4]`.
      regions: RoIAlign features at the reference boxes, `[B, Q, bins, C]`, or None if no interaction of the layer needs
        them.
      filled_regions: the same with more bins behind, all zeros, which make products fast on GPUs; None: there are no more.
    """

    memory: Pyramid
    reference_boxes: jax.Array
    regions: jax.Array | None
    filled_regions: jax.Array | None = None


class Interaction(Protocol):
    """Maps queries `[B, Q, C]` and the encodings of their positions `[B, Q, C]` to refined queries `[B, Q, C]`, with the
    residual already added.

    Attributes:
      needs_regions: whether it reads `Surroundings.regions`.
    """

    needs_regions: bool

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array: ...


InteractionFactory = Callable[[nnx.Rngs], Interaction]


@dataclasses.dataclass(frozen=True)
class SharedSettings:
    """Settings of the detector that are passed to every interaction, in front of the interaction's own.

    Attributes:
      channels: C.
      heads, levels, points: of the detector's deformable attention.
      region_size: number of bins along each side of a region.
      implementation: of the operations that have a kernel, see `ops.dispatch`.
    """

    channels: int
    heads: int
    levels: int
    points: int
    region_size: int
    implementation: str | None = None


def map_regions(
    function: Callable[[jax.Array, jax.Array], jax.Array], query: jax.Array, surroundings: Surroundings
) -> jax.Array:
    """Applies a function to the queries `[B, Q, C]` and their regions, on CPUs chunk by chunk -> `[B, Q, C]`.

    Args:
      function: queries `[n, C]` and their regions `[n, bins, C]` -> `[n, C]`. Behind a region's own bins may be others, of
        zeros, which must not count. The result is saved for the backward pass.
    """
    regions = surroundings.regions if surroundings.filled_regions is None else surroundings.filled_regions
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (query, regions))
    return saved(by_chunks(lambda rows: function(*rows), CHUNK, rows)).reshape(query.shape)
