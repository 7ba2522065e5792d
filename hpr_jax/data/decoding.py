"""Encoded images become RGB samples of 8 bits.

Of the bits that samples of 16 use, the upper 8 are kept. By default these are the upper 8 of 16. Microscopes, scanners and
other instruments often store 10, 12 or 14 bits in 16, and their pictures are dark unless `config.data.image_bits` says so.
"""

import warnings

import cv2
import numpy as np

# Pillow would warn of damaged images, about which a sentence is written.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# The number of bits that the samples of 16-bit images use unless it is known better, and the fewest that they may use.
MOST_BITS, FEWEST_BITS = 16, 8
# An image without a sample above a quarter of the range is dark: it looks as if fewer bits were used.
DARK = 64


def to_eight_bits(samples: np.ndarray, bits: int = MOST_BITS) -> np.ndarray:
    """The upper 8 of the `bits` bits that samples use: `samples >> (bits - 8)`, and 255 where they use more.

    Args:
      samples: uint16 of any shape.
      bits: from 8 to 16.

    Returns:
      uint8 of the same shape.
    """
    return np.minimum(samples >> (bits - FEWEST_BITS), 255).astype(np.uint8)


def decode(data: bytes, bits: int = MOST_BITS, *, turned: bool = True) -> np.ndarray | None:
    """Decodes an image to RGB uint8 `[h, w, 3]`; None if it cannot be decoded.

    Args:
      data: the encoded image.
      bits: number of bits that its samples use if they are stored in 16.
      turned: whether to turn it as its EXIF orientation says.
    """
    flags = cv2.IMREAD_COLOR if turned else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    samples = _imdecode(data, flags | cv2.IMREAD_ANYDEPTH)
    if samples is not None and samples.dtype == np.uint16:
        samples = to_eight_bits(samples, bits)
    elif samples is not None and samples.dtype != np.uint8:
        # OpenCV has a rule of its own for floating-point numbers, in most formats.
        samples = _imdecode(data, flags)
    if samples is None or samples.dtype != np.uint8:
        return None
    # OpenCV could turn BGR into RGB while it decodes, but forgets it in two formats: TIFF of 16 bits, and PAM.
    return cv2.cvtColor(samples, cv2.COLOR_BGR2RGB)


def bits_if_dark(data: bytes, pixels: np.ndarray) -> int:
    """The number of bits, at least 8, that the largest sample of an image takes, if it is stored in 16 and dark; else 0.

    Args:
      data: the encoded image.
      pixels: what it was decoded to, uint8 of any shape.
    """
    if pixels.max(initial=0) >= DARK:
        return 0
    samples = _imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if samples is None or samples.dtype != np.uint16:
        return 0
    return max(FEWEST_BITS, int(samples.max(initial=0)).bit_length())


def advice_on_bits(bits: int) -> str:
    """What can be done about dark images of 16 bits whose largest sample takes `bits` bits, as a clause."""
    return f"their largest sample takes {bits} bits; --config.data.image_bits={bits} keeps the upper 8 of these"


def _imdecode(data: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        return None
