"""Loaders for worker processes, which import this file: it must be light."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import cv2

# As loaders of images do, limits OpenCV's threads.
import hpr_jax.data.augmentation.geometry  # noqa: F401


class Slow:
    """Its first batches are there at once, the others never."""

    def __init__(self, quick=0):
        self.quick = quick

    def __getitem__(self, step):
        if step >= self.quick:
            time.sleep(600)
        return step


class Describing:
    """Its batches say what the worker is like."""

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


class Odd(Exception):
    """Cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class Failing:
    """Has no batches; leaves without a word at the second step."""

    def __getitem__(self, step):
        if step == 0:
            raise Odd("this", step)
        if step == 1:
            os._exit(3)
        raise ConnectionResetError("of a file server")
