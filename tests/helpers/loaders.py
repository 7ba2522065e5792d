"""Loaders for worker processes. They import this file, so it must import little."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import cv2

# Imported to limit OpenCV's threads, as it does for loaders of images.
import hpr_jax.data.augmentation.crop_resize_flip  # noqa: F401
from hpr_jax.data.loading.batches import empty_batch


class Empty:
    """The batch of a step has no room for images."""

    def __getitem__(self, step):
        return empty_batch(0, (1, 1), 0)


class Slow:
    """The first `quick` batches are loaded at once, the others never."""

    def __init__(self, quick=0):
        self.quick = quick

    def __getitem__(self, step):
        if step >= self.quick:
            time.sleep(600)
        return step


class Describing:
    """Batches are descriptions of the worker process that loads them."""

    def __getitem__(self, step):
        return {
            "pid": os.getpid(),
            "imports JAX": "jax" in sys.modules,
            "platform": os.environ["JAX_PLATFORMS"],
            "OpenCV's threads": cv2.getNumThreads(),
            "threads": threading.active_count(),
            "threads of the system": len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 2,
            "ignores": {signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)} == {signal.SIG_IGN},
        }


class Watching:
    """Batches of another loader, and whether the process that loaded them has imported JAX."""

    def __init__(self, loader):
        self.loader = loader

    def __getitem__(self, step):
        return self.loader[step], "jax" in sys.modules


class Odd(Exception):
    """An exception that cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class Failing:
    """Instead of a first batch there is an exception that cannot be unpickled, the second one ends the process, and all
    others are errors."""

    def __getitem__(self, step):
        if step == 0:
            raise Odd("this", step)
        if step == 1:
            os._exit(3)
        raise ConnectionResetError("of a file server")
