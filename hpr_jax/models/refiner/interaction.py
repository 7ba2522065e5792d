"""What a refiner may look at besides the queries themselves."""

from collections.abc import Callable
from typing import Protocol

import flax.struct
import jax
from flax import nnx

from hpr_jax.models.pyramid import Pyramid


@flax.struct.dataclass
class Surroundings:
    """Inputs that all refiners of a layer share.

    Attributes:
      memory: the encoder's output.
      reference_boxes: normalised cxcywh `[B, Q, 4]`.
      regions: RoIAlign features `[B, Q, bins, C]` at the reference boxes, or None when no refiner of the layer asks.
    """

    memory: Pyramid
    reference_boxes: jax.Array
    regions: jax.Array | None


class Interaction(Protocol):
    """How a refiner looks at the image: queries and their positions `[B, Q, C]` -> `[B, Q, C]`, residual included."""

    needs_regions: bool

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array: ...


InteractionFactory = Callable[[nnx.Rngs], Interaction]


# Whose regions are looked at at once: they, and the kernels generated for them, stay in a CPU's caches.
CHUNK = 128


def flat(query: jax.Array, surroundings: Surroundings) -> tuple[jax.Array, jax.Array]:
    """Queries and their regions, image after image: `[B * Q, C]` and `[B * Q, bins, C]`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (query, surroundings.regions))
