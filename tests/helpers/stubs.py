"""Stand-ins for parts of a detector, and arrays to give them, for tests of single parts."""

import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpr_jax.models.pyramid import TOKENS_MULTIPLE, Pyramid

RNG = np.random.default_rng(0)


def stub(**attributes: Any) -> Any:
    """An object with these attributes alone, which can stand in for any other."""
    return types.SimpleNamespace(**attributes)


def floats(values: Any) -> Any:
    """A float32 array of NumPy, which JAX takes for one of its own."""
    return np.asarray(values, np.float32)


def pyramid(
    tokens: Any, shapes: Sequence[tuple[int, int]], sizes: Any, *, image_size: Any = (64, 64), valid: Any = None
) -> Pyramid:
    """The pyramid of one image. Its tokens are filled up to a multiple of 8, as `join_levels` does.

    Args:
      tokens: `[S, C]`, those of the levels.
      shapes: (height, width) of each level.
      sizes: valid (height, width) of each level.
      image_size: (height, width) of the image.
      valid: bool `[S]`; None: all tokens are valid.
    """
    valid = np.ones(len(tokens), bool) if valid is None else np.asarray(valid)
    tokens, sizes, image_size = floats(tokens), np.asarray(sizes, np.int32), np.asarray(image_size, np.int32)
    fill = -len(tokens) % TOKENS_MULTIPLE
    tokens, valid = np.pad(tokens, ((0, fill), (0, 0))), np.pad(valid, (0, fill))
    return Pyramid(tokens[None], valid[None], sizes[None], image_size[None], tuple(shapes))


def array(*shape: int) -> Any:
    """Random numbers, others at every call."""
    return RNG.normal(size=shape).astype(np.float32)
