"""Stored images: where their bytes are, and how they are decoded."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import cv2
import numpy as np


class UnreadableImageError(Exception):
    """An image is missing or broken, or it is not the one that was annotated."""


class OtherSizeError(UnreadableImageError):
    """An image can be decoded, but it has not the annotated size."""


class EncodedImage(Protocol):
    """A stored image. It knows where its bytes are, and so is small enough to be sent to another process."""

    @property
    def name(self) -> str:
        """The name that messages give the image."""

    @property
    def exif(self) -> bool:
        """Whether to turn the image as its EXIF orientation says, unless only the image as stored has the annotated size."""

    def read(self) -> bytes:
        """The encoded image.

        Raises:
          UnreadableImageError: the image is missing or its storage is damaged.
        """


class EncodedImages(Protocol):
    """The images of a split, by their position in it."""

    @property
    def names(self) -> Sequence[str]:
        """Names of their files, as the annotations have them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> EncodedImage: ...


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own."""

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


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The image files of a split: names relative to a folder."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> ImageFile:
        return ImageFile(self.folder / self.names[index])

    def __iter__(self) -> Iterator[ImageFile]:
        return (self[index] for index in range(len(self)))


def read_image(path: Path) -> np.ndarray:
    """Decodes a file to RGB uint8 `[h, w, 3]`, turned as its EXIF orientation says.

    Raises:
      UnreadableImageError: the file is missing or not an image.
    """
    image = ImageFile(Path(path))
    return _decode(image.read(), image.name)


def read_annotated_image(image: EncodedImage, height: int, width: int) -> np.ndarray:
    """Reads and decodes an image to RGB uint8 `[height, width, 3]`, in the orientation that its annotations refer to.

    Raises:
      UnreadableImageError: the image is missing, broken, or has the annotated size in no orientation.
    """
    return decode_annotated(image.read(), image, height, width)


def decode_annotated(data: bytes, image: EncodedImage, height: int, width: int) -> np.ndarray:
    """Does what `read_annotated_image` does with `data`, the bytes of the image, which were read before."""
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
