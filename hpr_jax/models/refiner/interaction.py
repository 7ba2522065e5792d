"""What a refiner may look at besides the queries themselves."""

import flax.struct
import jax

from hpr_jax.models.encoder import Pyramid


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
