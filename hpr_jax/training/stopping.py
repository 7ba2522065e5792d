"""Signals ask a run to stop: it ends its step, saves, and leaves with an exit code that tells which signal came."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

from hpr_jax.errors import StoppedError
from hpr_jax.runtime import console

log = logging.getLogger("hpr_jax")

# Exit codes by signal. Schedulers send SIGTERM, and 75 tells them to try again later (EX_TEMPFAIL of sysexits.h). SIGHUP
# comes when the terminal is closed or the connection to it lost.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 129}


class StopRequests:
    """As a context, notes SIGTERM, SIGHUP, and the first SIGINT (Ctrl-C); a second SIGINT does what it did before. A signal
    that is ignored, as SIGHUP is under nohup, stays so.

    Attributes:
      noted: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.noted: signal.Signals | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        # Python delivers signals to the main thread alone, and lets no other thread set handlers.
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._note) for number in heeded}
        console.PROMPT.add(self._note)
        return self

    def __exit__(self, *_) -> None:
        console.PROMPT.remove(self._note)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if console.is_repeated(frame):
            return
        if number == self.noted == signal.SIGINT:
            earlier = self._handlers[number]
            (earlier if callable(earlier) else signal.default_int_handler)(number, frame)
        self.noted = signal.Signals(number)
        again = " Another Ctrl-C ends it without." if number == signal.SIGINT else ""
        log.warning("%s: the run ends when its step is done and saved.%s", self.noted.name, again)

    def stop(self, step: int) -> StoppedError:
        """The error to leave with, once step `step` is saved."""
        # If no signal came to this process, another process of the run was asked to stop.
        number = self.noted or signal.SIGTERM
        return StoppedError(
            f"Stopped by {number.name}; step {step} is saved, and the same command goes on from it.", EXIT_CODES[number]
        )
