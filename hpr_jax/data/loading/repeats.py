"""Repeat-factor sampling: an epoch takes images of rare classes more than once (LVIS, Gupta et al. 2019, appendix B)."""

import numpy as np


def repeat_factors(images: np.ndarray, labels: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """How often each image is taken in an epoch, on average: float64 `[count]`, at least 1.

    A class that a part f of the images shows has the factor max(1, sqrt(threshold / f)), and an image the largest factor of
    its classes.

    Args:
      images: image of each object, int64 `[n]`.
      labels: class of each object, int32 `[n]`.
      count: number of images.
      threshold: part of the images below which a class is rare.
    """
    shown = np.unique(np.stack([images, labels], axis=-1), axis=0)
    frequency = np.bincount(shown[:, 1]) / max(count, 1)
    with np.errstate(divide="ignore"):
        of_classes = np.maximum(1.0, np.sqrt(threshold / frequency))
    factors = np.ones(count)
    np.maximum.at(factors, shown[:, 0], of_classes[shown[:, 1]])
    return factors


def draw_repeats(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each image is taken in one epoch: int64, rounded up or down at random. The sum is the same in every epoch,
    that of the factors, rounded.

    The fractions of the factors lie one behind the other on a line, in a random order, and a comb with teeth at a distance
    of 1 says which are rounded up. Before, they are stretched until the line has a whole length.
    """
    whole = np.floor(factors)
    fractions = factors - whole
    length = round(float(factors.sum())) - int(whole.sum())
    order = rng.permutation(len(factors))
    ends = np.floor(np.cumsum(fractions[order]) * (length / max(fractions.sum(), 1e-9)) + rng.random())
    ends[-1] = length
    taken = whole.astype(np.int64)
    taken[order] += np.diff(ends, prepend=0).astype(np.int64)
    return taken
