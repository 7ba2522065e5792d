"""Stored images: where their bytes are, and how they are decoded."""

import dataclasses
import errno
import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from PIL import ExifTags, Image

from hpr_jax.data.decoding import MOST_BITS, advice_on_bits, bits_if_dark, decode

# An image file may have at most so many bytes, and an image so many pixels: more would take the machine's memory. The second
# is the limit of Pillow, which reads the headers.
LARGEST_FILE = 2**30
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
# Below the limit Pillow warns at half of it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Suffixes of the files in a folder that are taken for images.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# EXIF orientations that swap height and width.
_LYING = (5, 6, 7, 8)
# Errors of a storage, not of one file in it.
_STORAGE_ERRORS = {
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENODEV,
    errno.ENXIO,
}
# What was said of dark images, which is said once.
_said: set[str] = set()

log = logging.getLogger("hpr_jax")


class UnreadableImageError(Exception):
    """An image is missing or broken, or it is not the one that was annotated."""


class UnreachableError(UnreadableImageError):
    """The folder that an image is in is gone or empty, or its storage does not answer: no other image of it can be read."""


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

    @property
    def bits(self) -> int:
        """The number of bits that its samples use if they are stored in 16."""

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
    """An image in a file of its own; `folder` is the one that all images of its split are in, None for a single image."""

    path: Path
    folder: Path | None = None
    exif: ClassVar[bool] = True
    bits: ClassVar[int] = MOST_BITS

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        try:
            # Without waiting, since a pipe without a writer would be waited for forever.
            with open(self.path, "rb", opener=open_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UnreadableImageError(f"{self.path} is no regular file")
                if status.st_size > LARGEST_FILE:
                    raise UnreadableImageError(
                        f"{self.path} has {status.st_size:,} bytes, and an image may have {LARGEST_FILE:,}"
                    )
                # No more than that, even if the file grows.
                return file.read(LARGEST_FILE)
        except OSError as error:
            if self.folder is not None and (trouble := _trouble(self.folder, error)):
                raise UnreachableError(f"The folder {self.folder} {trouble}") from error
            raise UnreadableImageError(f"{self.path}: {error.strerror}") from error
        except ValueError as error:
            raise UnreadableImageError(f"{str(self.path)!r} is no possible name of a file") from error


def _trouble(folder: Path, error: OSError) -> str:
    """What is wrong with a folder, as the end of a sentence, if it is why a file in it cannot be read; else ""."""
    if error.errno in _STORAGE_ERRORS:
        return "cannot be reached"
    try:
        # The folder in which a storage was mounted is empty when it no longer is.
        with os.scandir(folder) as entries:
            return "is empty" if next(entries, None) is None else ""
    except OSError:
        return "cannot be reached"


def open_without_waiting(path: str, flags: int) -> int:
    """An opener for `open`, which does not wait for a pipe's writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The image files of a split: names relative to a folder."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> ImageFile:
        return ImageFile(self.folder / self.names[index], self.folder)

    def __iter__(self) -> Iterator[ImageFile]:
        return (self[index] for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class ImageOfFewerBits:
    """An image whose samples, if they are stored in 16 bits, use fewer of them."""

    image: EncodedImage
    bits: int

    @property
    def name(self) -> str:
        return self.image.name

    @property
    def exif(self) -> bool:
        return self.image.exif

    def read(self) -> bytes:
        return self.image.read()


@dataclasses.dataclass(frozen=True)
class ImagesOfFewerBits:
    """The images of a split whose samples, where they are stored in 16 bits, use fewer of them."""

    images: EncodedImages
    bits: int

    @property
    def names(self) -> Sequence[str]:
        return self.images.names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> ImageOfFewerBits:
        return ImageOfFewerBits(self.images[index], self.bits)


def read_image(path: Path, bits: int = MOST_BITS) -> np.ndarray:
    """Decodes a file to RGB uint8 `[h, w, 3]`, turned as its EXIF orientation says.

    The first one of those that are dark, since their samples are stored in 16 bits and use fewer, is told of in the log.

    Args:
      bits: number of bits that the samples of a 16-bit image use.

    Raises:
      UnreadableImageError: the file is missing or not an image.
    """
    image = ImageFile(Path(path))
    return read_image_bytes(image.read(), image.name, bits)


def read_image_bytes(data: bytes, name: str, bits: int = MOST_BITS) -> np.ndarray:
    """Decodes the content of a file as `read_image` does; `name` names it in messages.

    Raises:
      UnreadableImageError: it is not an image.
    """
    _declared_size(data, name)
    pixels = _decode(data, name, bits)
    used = bits_if_dark(data, pixels)
    if used and (advice := advice_on_bits(used)) not in _said:
        _said.add(advice)
        log.warning("%s has samples of 16 bits, and is dark: %s.", name, advice)
    return pixels


def read_size(path: Path) -> tuple[int, int] | None:
    """The (height, width) of an image file in pixels, turned as its EXIF orientation says; None if it cannot be read.

    The header says it, so that large folders can be measured; only formats that Pillow does not know are decoded.
    """
    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            with Image.open(file) as image:
                width, height = image.size
                lying = image.getexif().get(ExifTags.Base.Orientation) in _LYING
                return (width, height) if lying else (height, width)
    except OSError as error:
        # The errors of Pillow have no number.
        if error.errno is not None:
            return None
    except Exception:
        # Pillow raises errors of any type for damaged headers.
        pass
    try:
        height, width = read_image(path).shape[:2]
    except UnreadableImageError:
        return None
    return height, width


def read_annotated_image(image: EncodedImage, height: int, width: int) -> np.ndarray:
    """Reads and decodes an image to RGB uint8 `[height, width, 3]`, in the orientation that its annotations refer to.

    Raises:
      UnreadableImageError: the image is missing, broken, or has the annotated size in no orientation.
    """
    return decode_annotated(image.read(), image, height, width)


def decode_annotated(data: bytes, image: EncodedImage, height: int, width: int) -> np.ndarray:
    """Does what `read_annotated_image` does with `data`, the bytes of the image, which were read before."""
    declared = _declared_size(data, image.name)
    if declared is not None and sorted(declared) != sorted((height, width)):
        raise _other_size(image, declared, height, width)
    pixels = _decode(data, image.name, image.bits, turned=image.exif)
    if image.exif and pixels.shape[:2] != (height, width):
        # Some data sets are annotated on the pixels as stored, without the EXIF rotation.
        stored = _decode(data, image.name, image.bits, turned=False)
        pixels = stored if stored.shape[:2] == (height, width) else pixels
    if pixels.shape[:2] != (height, width):
        raise _other_size(image, pixels.shape[:2], height, width)
    return pixels


def _other_size(image: EncodedImage, found: Sequence[int], height: int, width: int) -> OtherSizeError:
    return OtherSizeError(f"{image.name} is {found[1]}x{found[0]} pixels, its annotation says {width}x{height}")


def _declared_size(data: bytes, name: str) -> tuple[int, int] | None:
    """The (height, width) that the header of an image says it is stored with; None if Pillow does not know the format.

    Raises:
      UnreadableImageError: there are more pixels than any image may have. They would be made before anything else is seen
        to be wrong, from a file that may be small.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name} has more than the {MOST_PIXELS:,} pixels that an image may have") from error
    except Exception:
        # Pillow raises errors of any type for damaged headers. OpenCV knows more formats, and will say what it thinks.
        return None
    return height, width


def _decode(data: bytes, name: str, bits: int, *, turned: bool = True) -> np.ndarray:
    image = decode(data, bits, turned=turned)
    if image is None:
        raise UnreadableImageError(f"{name} is not an image that can be decoded")
    return image
