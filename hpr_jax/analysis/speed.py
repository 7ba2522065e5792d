"""How fast a detector is on this machine."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from hpr_jax.inference.image_detector import ImageDetector

# A measurement is made at least and at most so often, and no more after so many seconds.
FEWEST, MOST, SECONDS = 3, 30, 10.0


@dataclasses.dataclass(frozen=True)
class Speed:
    """Medians of several measurements.

    Attributes:
      device: the kind of device that detects.
      size: (height, width) of the image, as it is on disk.
      latency: seconds from one decoded image to its boxes, with resizing.
      batch_size: images of a batch.
      images_per_second: when whole batches are detected, without reading and resizing.
    """

    device: str
    size: tuple[int, int]
    latency: float
    batch_size: int
    images_per_second: float


def measure_speed(detector: ImageDetector, image: np.ndarray) -> Speed:
    """Measures how fast objects are detected in an image, and in batches of it, as large as in evaluation.

    Args:
      image: RGB uint8 `[h, w, 3]`.
    """
    batch_size = detector.config.evaluate.batch_size
    height, width = image.shape[:2]
    latency = median_seconds(lambda: detector(image))
    batch = median_seconds(detector.prepared_batch(image, batch_size))
    device = jax.devices()[0].device_kind
    return Speed(device, (height, width), latency, batch_size, batch_size / batch)


def median_seconds(work: Callable[[], object]) -> float:
    """The median time of some work, which is done once before, so that nothing is compiled meanwhile."""
    work()
    times: list[float] = []
    while len(times) < FEWEST or (len(times) < MOST and sum(times) < SECONDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
