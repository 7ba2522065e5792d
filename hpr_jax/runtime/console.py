"""Keeps the console from ending a run: what it cannot show is left out, and errors of helpers are no tracebacks."""

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

log = logging.getLogger("hpr_jax")


class _Tolerant(io.FileIO):
    """A file that takes what it is given although nobody reads it: the pipe may be closed, or the disk full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def tolerant(stream: TextIO) -> TextIO:
    """A stream that writes where another one does, and raises no errors; the same one if it is no file of the system.

    Characters that its encoding lacks are written as escapes.
    """
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return stream
    stream.flush()
    raw = _Tolerant(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


# The file descriptor at which `leave` says that it ends the process.
_descriptor = 2


def say_at(descriptor: int) -> None:
    """From now on `leave` speaks at this file descriptor, not at standard error, which may lead elsewhere for a while."""
    global _descriptor
    _descriptor = descriptor


def leave(_number: int = 0, frame: FrameType | None = None) -> None:
    """Ends the process at once, as a handler of Ctrl-C. An exception is no way to end at any moment: libraries that are
    being imported crash on it, or take it for an error of their own."""
    if is_repeated(frame):
        return
    with contextlib.suppress(OSError):
        os.write(_descriptor, b"hpr_jax: stopped.\n")
    os._exit(130)


# Handlers of signals that the thread of `hear_signals` calls, too. Each begins as `leave` does.
PROMPT: set[Callable[[int, FrameType | None], object]] = {leave}
_hearing = threading.Event()


def hear_signals() -> None:
    """From now on a thread calls the handlers in `PROMPT` as soon as their signal comes. Python calls them in the main
    thread, between two of its instructions, and the compilation of a program, which can take minutes, is a single one."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=[reading], daemon=True, name="hears signals").start()
    _hearing.set()


def is_repeated(frame: FrameType | None) -> bool:
    """Whether a handler in `PROMPT` that is called with this frame was called by the thread before. The main thread calls it
    with a frame, the other one without."""
    return frame is not None and _hearing.is_set()


def _listen(file: int) -> None:
    while True:
        for number in os.read(file, 1):
            handler = signal.getsignal(number)
            if callable(handler) and handler in PROMPT:
                handler(number, None)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A context in which Ctrl-C raises KeyboardInterrupt, for what must be finished or deleted before the process ends."""
    if signal.getsignal(signal.SIGINT) is not leave or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, leave)


def protect_from_console() -> None:
    """From now on no error of the console, and none in a thread or a callback of a library, ends in a traceback."""
    sys.stdout, sys.stderr = tolerant(sys.stdout), tolerant(sys.stderr)
    logging.raiseExceptions = False
    sys.excepthook = _excepthook
    threading.excepthook = _thread_excepthook
    sys.unraisablehook = _unraisablehook


def _excepthook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Libraries in C++ report errors of their own threads here, like those of a write that has failed already."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, traceback)


def _thread_excepthook(arguments: Any) -> None:
    error = arguments.exc_value
    # A full disk is reported by whoever waits for what is to be written.
    if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        log.warning("A thread has ended with %s: %s", type(error).__name__, error)


def _unraisablehook(unraisable: Any) -> None:
    """Ctrl-C may come while the interpreter runs a callback, which cannot raise: it is sent again, after the callback."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
