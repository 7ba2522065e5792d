"""Images: where they are stored, and how they are decoded."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Protocol

import cv2
import numpy as np


class UnreadableImageError(Exception):
    """An image that is missing, broken, or not the one that was annotated."""


class OtherSizeError(UnreadableImageError):
    """An image that can be read, but not of the annotated size."""


class EncodedImage(Protocol):
    """An image as it is stored; little to send to another process.

    Attributes:
      name: for messages.
      exif: whether its annotations refer to the image turned as its EXIF orientation says, where its size leaves that open.
    """

    name: str
    exif: bool

    def read(self) -> bytes:
        """The encoded image.

        Raises:
          UnreadableImageError: there is none.
        """


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image that is a file of its own."""

    path: Path
    exif: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"{self.path}: {error.strerror}") from error


def read_image(path: Path) -> np.ndarray:
    """Decodes a file to RGB uint8 `[h, w, 3]`, turned as its EXIF orientation says.

    Raises:
      UnreadableImageError: the file is missing or not an image.
    """
    image = ImageFile(Path(path))
    return _decode(image.read(), image.name)


def read_annotated_image(image: EncodedImage, height: int, width: int) -> np.ndarray:
    """Decodes an image like `read_image`, in the orientation that the annotations refer to.

    Raises:
      UnreadableImageError: also when neither orientation has the annotated size.
    """
    return decode_annotated(image.read(), image, height, width)


def decode_annotated(data: bytes, image: EncodedImage, height: int, width: int) -> np.ndarray:
    """`read_annotated_image` of an image whose bytes were read."""
    pixels = _decode(data, image.name, turned=image.exif)
    if image.exif and pixels.shape[:2] != (height, width):
        # Some data sets are annotated on the pixels as stored, without the EXIF rotation.
        stored = _decode(data, image.name, turned=False)
        pixels = stored if stored.shape[:2] == (height, width) else pixels
    if pixels.shape[:2] != (height, width):
        raise OtherSizeError(
            f"{image.name} is {pixels.shape[1]}x{pixels.shape[0]} pixels, its annotation says {width}x{height}"
        )
    return pixels


def _decode(data: bytes, name: str, *, turned: bool = True) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB if turned else cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        image = None
    if image is None:
        raise UnreadableImageError(f"{name} is not an image that can be decoded")
    return image
