"""The application: what each address answers.

`GET /` the page; `POST /detect` and `POST /explain` take an image and answer in JSON; `GET /info` tells what the server has,
and `GET /health` how it is.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from hpr_jax.errors import UserError
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.exported import ExportedDetector
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.serving.batcher import Batcher
from hpr_jax.serving.guard import Guard, policy_of
from hpr_jax.serving.limits import MOST_QUERIES, Limits
from hpr_jax.serving.refusal import Refusal, json_response
from hpr_jax.serving.uploads import check_head, decode_upload, discard, read_body, uploaded_image

log = logging.getLogger("hpr_jax")

PAGE = Path(__file__).with_name("page.html")
# Seconds for which a request waits for others to be computed with.
PATIENCE = 0.004
# The lowest score of the detections that are answered, and how many queries of each branch, unless a request says otherwise.
THRESHOLD, QUERIES = 0.3, 10

Answer = Callable[["Service", Request, bytes], Awaitable[dict[str, Any]]]


class Service:
    """A detector and those who wait for it.

    Args:
      name: of the detector, for the page.
      limits: of what is taken.

    Attributes:
      batcher: computes.
    """

    def __init__(self, detector: ImageDetector, name: str, limits: Limits):
        self.detector, self.name, self.limits = detector, name, limits
        self.explains = not isinstance(detector, ExportedDetector)
        self.batch_size = int(detector.config.evaluate.batch_size)
        # An exported program takes as long for one image as for a batch.
        fewest = (self.batch_size + 1) // 2 if self.explains else 1
        self.batcher = Batcher[np.ndarray, Detections](
            lambda images: detector(images, 0.0), most=self.batch_size, fewest=fewest, patience=PATIENCE
        )
        self.requests = self._bytes = 0
        decoders = min(4, os.cpu_count() or 1)
        self._decoders = ThreadPoolExecutor(decoders, "decodes")
        # So many images have pixels at the same time: two batches, of which one is computed, and those that are decoded.
        self._decoded = asyncio.Semaphore(2 * self.batch_size + decoders)

    async def answer(self, request: Request, answer: Answer) -> Response:
        """Carries out a request that sends an image, within the limits."""
        try:
            check_head(request, self.limits)
            with self._room():
                return await self._in_time(request, answer)
        except Refusal as refusal:
            if refusal.status != 408:
                await discard(request)
            return refusal.response()
        except ClientDisconnect:
            # Nobody gets this.
            return Response(status_code=400)
        except Exception:
            log.exception("A request has failed:")
            return json_response({"error": "The server could not do this; its log says why."}, 500)

    async def _in_time(self, request: Request, answer: Answer) -> Response:
        clock, body = asyncio.get_running_loop().time, None
        start = clock()
        try:
            async with asyncio.timeout(self.limits.seconds):
                with contextlib.closing(_Counted(self, request)) as counted:
                    body = await read_body(counted.chunks(), self.limits)
                    content = await _unless_gone(request, answer(self, request, body))
        except TimeoutError:
            if body is None:
                sentence = f"The upload took more than {self.limits.seconds:g} seconds."
                raise Refusal(408, sentence, {"Connection": "close"}) from None
            raise Refusal(504, f"There was no answer within {self.limits.seconds:g} seconds.", self._later()) from None
        return json_response({**content, "seconds": round(clock() - start, 4)})

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """A context in which a request has room, or is refused."""
        if self.requests >= self.limits.requests:
            raise self.full()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def hold(self, count: int) -> None:
        """Counts bytes of uploads that are held; raises a Refusal if there is no room for them."""
        if count > 0 and self._bytes + count > self.limits.memory:
            raise self.full()
        self._bytes += count

    def full(self) -> Refusal:
        return Refusal(503, "There is no room for more requests now; send it again later.", self._later())

    def _later(self) -> dict[str, str]:
        """When it is worth to come again: when those that wait have been answered."""
        seconds = np.clip(np.ceil(self.requests * self.batcher.seconds), 1, 600)
        return {"Retry-After": f"{int(seconds)}"}

    @contextlib.asynccontextmanager
    async def decoded(self, request: Request, body: bytes) -> AsyncIterator[np.ndarray]:
        """A context that has the pixels of an upload, RGB uint8 `[h, w, 3]`.

        Raises:
          Refusal: it has none.
        """
        data = await uploaded_image(request, body)
        async with self._decoded:
            bits = self.detector.config.data.image_bits
            loop = asyncio.get_running_loop()
            yield await loop.run_in_executor(self._decoders, decode_upload, data, self.limits, bits)

    async def detect(self, image: np.ndarray) -> tuple[Detections, int]:
        """All detections in an image, and how many images were computed together.

        Raises:
          Refusal: the detector does not take it.
        """
        try:
            shape = self.detector.input_shape(image)
        except UserError as error:
            log.warning("%s", error)
            height, width = image.shape[:2]
            raise Refusal(422, f"This detector takes no image of {width}x{height} pixels.") from error
        return await self.batcher.submit(image, shape)


class _Counted:
    """The body of a request, whose bytes are counted among those of the server until it is closed."""

    def __init__(self, service: Service, request: Request):
        self._service, self._request, self._held = service, request, 0

    async def chunks(self) -> AsyncIterator[bytes]:
        async for chunk in self._request.stream():
            self._service.hold(len(chunk))
            self._held += len(chunk)
            yield chunk

    def close(self) -> None:
        self._service.hold(-self._held)


async def _unless_gone(request: Request, answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """An answer, which is no longer worked on when the client has gone.

    Raises:
      ClientDisconnect: it has.
    """

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise ClientDisconnect
    finally:
        answering.cancel()
        leaving.cancel()


async def _detect(service: Service, request: Request, body: bytes) -> dict[str, Any]:
    threshold = _number(request, "threshold", THRESHOLD, 0.0, 1.0)
    async with service.decoded(request, body) as image:
        found, together = await service.detect(image)
    return {**found.above(threshold).to_dict(), "batch": together}


async def _explain(service: Service, request: Request, body: bytes) -> dict[str, Any]:
    if not service.explains:
        raise Refusal(422, "This detector was exported, and returns detections alone.")
    count = int(_number(request, "top", QUERIES, 1, MOST_QUERIES))
    async with service.decoded(request, body) as image:
        found = await service.batcher.alone(lambda: service.detector.branches(image, count))
    height, width = image.shape[:2]
    branches = {name: [queries.to_dict() for queries in layers] for name, layers in found.items()}
    return {"height": height, "width": width, "branches": branches}


def _number(request: Request, name: str, default: float, least: float, most: float) -> float:
    """A number in the query of an address.

    Raises:
      Refusal: it is none, or out of its range.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise Refusal(400, f"The {name} is a number from {least:g} to {most:g}, not {text[:40]!r}.")
    return number


def make_app(detector: ImageDetector, name: str, limits: Limits, names: Collection[str]) -> Starlette:
    """The application.

    Args:
      name: of the detector, for the page.
      limits: of what is taken.
      names: of this machine; requests for others are refused.
    """
    service = Service(detector, name, limits)
    page = PAGE.read_text(encoding="utf-8")

    async def index(request: Request) -> Response:
        return HTMLResponse(page)

    async def info(request: Request) -> Response:
        return json_response(_info(service))

    async def health(request: Request) -> Response:
        sizes = {str(size): count for size, count in sorted(service.batcher.sizes.items())}
        return json_response({"status": "ok", "requests": service.requests, "batches": sizes})

    async def detect(request: Request) -> Response:
        return await service.answer(request, _detect)

    async def explain(request: Request) -> Response:
        return await service.answer(request, _explain)

    async def no_such(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        sentence = "See /info." if error.status_code == 404 else f"{request.method} is not for this address."
        return json_response({"error": f"{error.detail}. {sentence}"}, error.status_code, error.headers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(service.batcher.work())
        yield
        work.cancel()

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/info", info),
            Route("/health", health),
            Route("/detect", detect, methods=["POST"]),
            Route("/explain", explain, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, names=names, policy=policy_of(page))],
        exception_handlers={HTTPException: no_such},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def _info(service: Service) -> dict[str, Any]:
    """What the page and programs may want to know."""
    limits, detector = service.limits, service.detector
    return {
        "detector": service.name,
        "classes": list(detector.classes.names),
        "explains": service.explains,
        "batch_size": service.batch_size,
        "threshold": THRESHOLD,
        "platform": jax.default_backend(),
        "limits": {"bytes": limits.upload, "pixels": limits.pixels, "seconds": limits.seconds, "requests": limits.requests},
        "versions": {"hpr_jax": version("hpr_jax"), "jax": jax.__version__, "python": sys.version.split()[0]},
    }
