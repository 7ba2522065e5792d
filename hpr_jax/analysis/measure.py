"""Measures how fast a detector is on this machine, and what memory it takes, and prints it as a table of Markdown."""

import jax
import numpy as np

from hpr_jax.analysis.costs import PHOTOGRAPHS
from hpr_jax.analysis.describe import Subject
from hpr_jax.analysis.speed import measure_speed
from hpr_jax.data.dataset import Classes
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.models.build import random_detector
from hpr_jax.runtime.host_memory import peak_memory
from hpr_jax.weights.source import open_source

# What the table has measured.
MEASURED = """\
Medians, after compiling. Latency: from a decoded {0}x{1} image to its boxes, with resizing to {2}x{3}. Images a second: when
batches that lie on the device are detected. Memory: the most {4}."""


def measure(subject: Subject) -> None:
    """Prints latency, throughput and memory of a detector; without a checkpoint its weights are random.

    Raises:
      UserError: see `Subject.settings`.
    """
    config, num_classes = subject.settings()
    if subject.checkpoint is not None:
        source = open_source(subject.checkpoint, subject.overrides, subject.config)
        detector = ImageDetector(source.load(), source.classes, source.config)
    else:
        names = tuple(f"class {number}" for number in range(num_classes))
        module = random_detector(config.model, num_classes, compute=config.compute)
        detector = ImageDetector(module, Classes(names, tuple(range(1, num_classes + 1))), config)
    # The commonest photograph, of noise.
    size = max(PHOTOGRAPHS, key=lambda size: PHOTOGRAPHS[size])
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    print("Compiling and measuring, which may take minutes (Ctrl-C to leave).", flush=True)
    speed = measure_speed(detector, image)
    statistics = jax.devices()[0].memory_stats() or {}
    memory, where = statistics.get("peak_bytes_in_use"), "in use on the device at a time"
    if memory is None:
        memory, where = peak_memory(), "that this process has had, compiling included"
    head = ["device", "JAX", "type", "latency", "batch", "images a second", "memory"]
    row = [
        speed.device,
        jax.__version__,
        config.compute.dtype,
        f"{1e3 * speed.latency:,.1f} ms",
        str(speed.batch_size),
        f"{speed.images_per_second:,.2f}",
        f"{memory / 1e9:,.2f} GB" if memory else "not known",
    ]
    print()
    for cells in (head, ["---"] * len(head), row):
        print(f"| {' | '.join(cells)} |")
    print(MEASURED.format(*size, *detector.input_shape(image), where))
