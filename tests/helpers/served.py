"""A server in a thread, for tests, and a detector that it serves: what it finds says which image it was given."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from pictures import CLASSES
from stubs import stub

from hpr_jax.errors import UserError
from hpr_jax.inference.branches import TopQueries
from hpr_jax.inference.detections import Detections
from hpr_jax.serving.app import make_app
from hpr_jax.serving.connections import make_server
from hpr_jax.serving.limits import Limits
from hpr_jax.serving.serve import listen


class FakeDetector:
    """Finds one object of score 0.9 and one of 0.2. The first one's box is (0, 0, r, g), the means of red and green.

    Attributes:
      seconds: that a call takes.
      batches: the numbers of images of its calls.
      hold: calls wait until it is set.
    """

    def __init__(self, batch_size: int = 4):
        self.classes = CLASSES
        self.config = stub(evaluate=stub(batch_size=batch_size), data=stub(image_bits=16))
        self.batches: list[int] = []
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, images: list[np.ndarray], threshold: float) -> list[Detections]:
        self.hold.wait(10)
        self.batches.append(len(images))
        if any(image.shape[:2] == (13, 13) for image in images):
            raise RuntimeError("a secret of the machine")
        return [self._detections(image) for image in images]

    def _detections(self, image: np.ndarray) -> Detections:
        red, green, _ = image.mean(axis=(0, 1))
        boxes = np.array([[0, 0, red, green], [1, 2, 3, 4]], np.float32)
        scores, labels = np.array([0.9, 0.2], np.float32), np.array([0, 2], np.int32)
        return Detections(image, boxes, scores, labels, ["cup", "hat"], [2, 9])

    def input_shape(self, image: np.ndarray) -> tuple[int, int]:
        height, width = image.shape[:2]
        if width > 1000:
            raise UserError("The image fits no program in /a/folder.")
        return -(-height // 128) * 128, -(-width // 128) * 128

    def branches(self, image: np.ndarray, count: int) -> dict[str, list[TopQueries]]:
        def layer(number: int) -> TopQueries:
            queries = np.arange(number, number + count)
            boxes, scores = np.zeros((count, 4), np.float32), np.linspace(0.75, 0.25, count)
            return TopQueries(queries, boxes, scores, queries % 3, [CLASSES.names[query % 3] for query in queries])

        return {"primary": [layer(0), layer(1)], "dynamic_conv": [layer(2), layer(3)]}


@contextlib.contextmanager
def served(detector: Any, limits: Limits | None = None, names: tuple[str, ...] = ("localhost",)) -> Iterator[int]:
    """A context in which a detector is served at the port that it gives."""
    limits = limits or Limits()
    server, listener = make_server(make_app(detector, "tiny", limits, names), limits), listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(
    port: int, path: str, body: Any = None, *, method: str = "", timeout: float = 20, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Sends a request; returns the status, the headers and what the JSON says. Underscores in their names are hyphens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, named)
        response = connection.getresponse()
        text = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, json.loads(text) if is_json else text.decode()
    finally:
        connection.close()
