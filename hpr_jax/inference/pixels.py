"""The pixels of whatever a user calls an image."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hpr_jax.data.decoding import to_eight_bits
from hpr_jax.data.images import UnreadableImageError, read_image, read_image_bytes
from hpr_jax.errors import UserError

ImageLike = np.ndarray | Image.Image | str | Path | bytes


def as_array(image: ImageLike, bits: int) -> np.ndarray:
    """The pixels of an image, RGB uint8 `[h, w, 3]`.

    Args:
      bits: number of bits that samples use where they are stored in 16.

    Raises:
      UserError: it cannot be read, or is of another type or shape.
    """
    try:
        if isinstance(image, str | Path):
            return read_image(Path(image).expanduser(), bits)
        if isinstance(image, bytes | bytearray | memoryview):
            return read_image_bytes(bytes(image), f"The image of {len(image)} bytes", bits)
    except UnreadableImageError as error:
        raise UserError(f"{error}.") from error
    if isinstance(image, Image.Image):
        return _from_pillow(image, bits)
    try:
        array = np.asarray(image)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.dtype.kind == "u" and array.itemsize == 2:
        array = to_eight_bits(array, bits)
    if array.ndim == 2 and array.dtype == np.uint8:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        what = f"an array of {array.dtype} {list(array.shape)}" if array.size else f"of type {type(image).__name__}"
        raise UserError(
            "An image is a path, the bytes of a file, a Pillow image, or an array of uint8 or uint16, RGB [h, w, 3] or grey "
            f"[h, w]; this one is {what}."
        )
    return array


def _from_pillow(image: Image.Image, bits: int) -> np.ndarray:
    """The pixels of a Pillow image as a file of it would be read: turned by its EXIF orientation, palettes looked up, grey
    as RGB, colours without their opacity, and of the `bits` bits that samples of 16 use, the upper 8."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return np.repeat(to_eight_bits(np.asarray(image), bits)[..., None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise UserError(f"A Pillow image of mode {image.mode!r} has no range of values; convert it to 'L' or 'RGB'.")
        pixels = np.asarray(image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB"))
    except OSError as error:
        raise UserError(f"The Pillow image cannot be decoded: {error}.") from error
    if 0 in pixels.shape:
        raise UserError("The Pillow image has no pixels.")
    return pixels
