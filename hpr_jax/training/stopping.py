"""Signals that ask a run to stop: it ends its step, saves, and leaves with an exit code that says so."""

import signal
import threading
from types import FrameType

from hpr_jax.errors import StoppedError

# SIGTERM is what schedulers send: 75 says "try again later" (EX_TEMPFAIL of sysexits.h).
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class StopRequests:
    """Notes SIGTERM and the first SIGINT while it is entered; a second SIGINT interrupts at once.

    Attributes:
      noted: the signal, or None.
    """

    def __init__(self):
        self.noted: signal.Signals | None = None
        self._handlers = {}

    def __enter__(self) -> "StopRequests":
        # Elsewhere than in the main thread, Python hands out no signals.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == self.noted == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = signal.Signals(number)

    def stop(self, step: int) -> StoppedError:
        """The error to leave with, once step `step` is saved. Another process may have been asked, and not this one."""
        number = self.noted or signal.SIGTERM
        return StoppedError(
            f"Stopped by {number.name}; step {step} is saved, and the same command goes on from it.", EXIT_CODES[number]
        )
