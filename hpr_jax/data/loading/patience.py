"""Waits for images whose folder cannot be reached for a while, as happens on networks."""

import time
from collections.abc import Callable
from typing import TypeVar

from hpr_jax.data.images import UnreachableError
from hpr_jax.errors import DataLostError

Read = TypeVar("Read")

# Seconds between two tries.
PAUSE = 1.0


class Patience:
    """Reads images again and again while their folder cannot be reached.

    Args:
      seconds: how long to wait for an image.

    Attributes:
      ended: whether nobody waits for images any more; what is being read is then given up.
    """

    def __init__(self, seconds: float):
        self.seconds, self.ended = seconds, False

    def __call__(self, read: Callable[[], Read]) -> Read:
        """What `read` returns.

        Raises:
          DataLostError: the folder could not be reached for so long.
        """
        began = time.monotonic()
        while True:
            try:
                return read()
            except UnreachableError as error:
                if self.ended or time.monotonic() - began >= self.seconds:
                    raise DataLostError(f"{error}, for {self.seconds:.0f} s now (config.data.patience).") from error
            time.sleep(PAUSE)
