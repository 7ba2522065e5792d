"""Stand-ins for parts of a detector, and arrays to give them, for tests of single parts."""

import types
from typing import Any

import numpy as np

from hpr_jax.models.pyramid import Pyramid


def stub(**attributes: Any) -> Any:
    """An object with these attributes alone, which can stand in for any other."""
    return types.SimpleNamespace(**attributes)


def floats(values: Any) -> Any:
    """A float32 array of NumPy, which JAX takes for one of its own."""
    return np.asarray(values, np.float32)


def pyramid(tokens: Any, shapes: Any, sizes: Any, image_size: tuple[int, int] = (64, 64), valid: Any = None) -> Pyramid:
    """The pyramid of one image.

    Args:
      tokens: `[S, C]`.
      shapes: (height, width) of each level.
      sizes: valid (height, width) of each level.
      image_size: (height, width) of the image.
      valid: bool `[S]`; None: all tokens are valid.
    """
    valid = np.ones(len(tokens), bool) if valid is None else valid
    parts: Any = floats(tokens), np.asarray(valid), np.asarray(sizes, np.int32), np.asarray(image_size, np.int32)
    tokens, valid, sizes, image_size = (part[None] for part in parts)
    return Pyramid(tokens, valid, sizes, image_size, tuple(shapes))
