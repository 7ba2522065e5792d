"""From the body of a request to the pixels of an image. Whatever a stranger sends costs no more than the limits."""

import asyncio
import io
from collections.abc import AsyncIterator

import numpy as np
from PIL import Image
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from hpr_jax.data.images import UnreadableImageError, read_image_bytes
from hpr_jax.serving.limits import MOST_SCANNED, Limits
from hpr_jax.serving.refusal import Refusal

# The formats that are decoded, by Pillow's names; fewer than those of files, since each decoder is one more way in.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_FORM = "multipart/form-data"
# What clients say of a body of which they know nothing; curl says the last one of everything.
_ANYTHING = ("", "application/octet-stream", "application/x-www-form-urlencoded")
# Seconds for which the rest of a body is taken and thrown away: a client that still sends might not see the answer.
_DISCARD_SECONDS = 2.0


def check_head(request: Request, limits: Limits) -> None:
    """Refuses an upload for what its head says.

    Raises:
      Refusal: it is too large, or it is no image.
    """
    kind = _media_type(request)
    if not (kind == _FORM or kind in _ANYTHING or kind.startswith("image/")):
        raise Refusal(415, f"Send the bytes of an image, or a form with a file; this is {kind[:80]}.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "Send the image as it is, without Content-Encoding.")
    if int(request.headers.get("content-length", 0)) > limits.upload:
        raise _too_large(limits)


async def read_body(body: AsyncIterator[bytes], limits: Limits) -> bytes:
    """The body of a request.

    Raises:
      Refusal: it is too large.
    """
    data = bytearray()
    async for chunk in body:
        data += chunk
        if len(data) > limits.upload:
            raise _too_large(limits)
    return bytes(data)


async def discard(request: Request) -> None:
    """Takes the rest of a body, for a short while, unless the client waits to be told to send it."""
    if request.headers.get("expect", "").lower() != "100-continue":
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                async for _ in request.stream():
                    pass
        except Exception:
            # The answer is sent whatever the client does.
            pass


async def uploaded_image(request: Request, body: bytes) -> bytes:
    """The bytes of the image: the body, or the first file of a form.

    Raises:
      Refusal: the form is damaged or has no file, or there is nothing.
    """
    if _media_type(request) == _FORM:
        body = await _file_of_form(request, body)
    if not body:
        raise Refusal(400, "There is no image; send its bytes as the body, or as a file of a form.")
    return body


async def _file_of_form(request: Request, body: bytes) -> bytes:
    async def stream():
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=16)
    # The file is never larger than the body, and so no file is made on the disk.
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, f"The form cannot be read: {error.message.rstrip('.')}.") from error
    for _, part in form.multi_items():
        if not isinstance(part, str):
            return await part.read()
    raise Refusal(400, "The form has no file; send one, as `curl -F image=@FILE` does.")


def decode_upload(data: bytes, limits: Limits, bits: int) -> np.ndarray:
    """Decodes an image to RGB uint8 `[h, w, 3]`, turned as its EXIF orientation says. Its header is looked at before pixels
    are made.

    Args:
      bits: number of bits that the samples of a 16-bit image use.

    Raises:
      Refusal: it is not an image, or too large a one.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            (width, height), kind = image.size, image.format
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(limits) from error
    except Exception as error:
        # Pillow raises errors of any type for damaged headers.
        raise Refusal(415, "This is no JPEG, PNG, WebP, BMP or TIFF image, or it is damaged.") from error
    if width * height > limits.pixels:
        raise _too_many_pixels(limits)
    # Within coded data the byte 0xFF is followed by 0 or by the mark of a restart.
    if kind in ("JPEG", "MPO") and data.count(b"\xff\xda") * width * height > MOST_SCANNED:
        raise Refusal(400, "The JPEG image has too many scans; save it as a baseline JPEG.")
    try:
        return read_image_bytes(data, "The upload", bits)
    except UnreadableImageError as error:
        raise Refusal(400, f"{error}.") from error


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"An upload may have {limits.upload:,} bytes, and this one has more; send a smaller image.")


def _too_many_pixels(limits: Limits) -> Refusal:
    return Refusal(413, f"An image may have {limits.pixels:,} pixels, and this one has more; send a smaller image.")
