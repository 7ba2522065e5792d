"""Colour operations of strong views: those of RandAugment (Cubuk et al. 2020) that HPR draws from.

Each maps RGB uint8 `[h, w, 3]` to the same, in new memory. Operations that blend the image with another one give the image
itself at strength 1. A result between two levels becomes the lower one, as in the official pipeline; only `color` rounds.
"""

from collections.abc import Callable

import cv2
import numpy as np

# All levels of a channel.
LEVELS = np.arange(256)


def identity(image: np.ndarray, strength: float) -> np.ndarray:
    """A copy."""
    return image.copy()


def auto_contrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Stretches the levels of each channel over the whole range."""
    table = np.empty((256, 3), np.uint8)
    for channel, counts in enumerate(_histograms(image)):
        present = np.flatnonzero(counts)
        low, high = present[0], present[-1]
        scale = 255.0 / max(high - low, 1)
        table[:, channel] = np.clip(LEVELS * scale - low * scale, 0, 255) if low < high else LEVELS
    return cv2.LUT(image, table[None])


def equalize(image: np.ndarray, strength: float) -> np.ndarray:
    """Spreads the levels of each channel, so that all are about equally frequent."""
    table = np.empty((256, 3), np.uint8)
    for channel, counts in enumerate(_histograms(image)):
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        table[:, channel] = np.minimum((below + step // 2) // step, 255) if step else LEVELS
        if step:
            table[0, channel] = 0
    return cv2.LUT(image, table[None])


def sharpness(image: np.ndarray, strength: float) -> np.ndarray:
    """Blends with a smoothed copy: below 1 blurs, above 1 sharpens. Strengths have one decimal."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = cv2.filter2D(image, -1, kernel)
    # Sums are multiples of a tenth. OpenCV rounds to the nearest level; with this offset, the result is the level below.
    # (The official sums are inexact: where they should be whole, in a tenth of the pixels, they are one level lower.)
    return cv2.addWeighted(image, strength, smooth, 1 - strength, -0.45)


def posterize(image: np.ndarray, strength: float) -> np.ndarray:
    """Keeps the upper `strength` bits of each level, rounded up to a whole number; 0 gives black."""
    shift = 8 - int(np.ceil(strength))
    return cv2.LUT(image, (LEVELS >> shift << shift).astype(np.uint8))


def solarize(image: np.ndarray, strength: float) -> np.ndarray:
    """Inverts the levels from `strength` on."""
    return cv2.LUT(image, np.where(strength > LEVELS, LEVELS, 255 - LEVELS).astype(np.uint8))


def color(image: np.ndarray, strength: float) -> np.ndarray:
    """Blends with the grey image: 0 is grey, above 1 is more colourful."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, strength, grey, 1 - strength, 0)


def contrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Blends with the mean grey level."""
    mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return cv2.LUT(image, _blended_levels(strength, mean))


def brightness(image: np.ndarray, strength: float) -> np.ndarray:
    """Blends with black."""
    return cv2.LUT(image, _blended_levels(strength, 0))


# The range of strengths of operations that blend, and of those that ignore their strength.
BLEND = (0.1, 1.9)
# The operations by name, each with the range that its strength is drawn from: uniformly, rounded to one decimal.
OPERATIONS: dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], tuple[float, float]]] = {
    "identity": (identity, BLEND),
    "auto_contrast": (auto_contrast, BLEND),
    "equalize": (equalize, BLEND),
    "sharpness": (sharpness, BLEND),
    "posterize": (posterize, (0.0, 4.0)),
    "solarize": (solarize, (0.0, 256.0)),
    "color": (color, BLEND),
    "contrast": (contrast, BLEND),
    "brightness": (brightness, BLEND),
}


def _blended_levels(strength: float, other: int) -> np.ndarray:
    """What becomes of each level where it is blended with the level `other`: uint8 `[256]`."""
    # The official blends are in single precision, too. There 0.7 x 10 is 7; in double precision it is a little less.
    levels = LEVELS.astype(np.float32)
    blended = cv2.addWeighted(levels, strength, np.full_like(levels, other), 1 - strength, 0)
    return np.clip(blended, 0, 255).astype(np.uint8).ravel()


def _histograms(image: np.ndarray) -> list[np.ndarray]:
    """Count of each level in each channel: three times int64 `[256]`."""
    return [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64) for channel in range(3)]
