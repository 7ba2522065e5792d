"""Errors that are the user's to mend: `main` prints them as one sentence and exits with code 2."""

import reprlib
from typing import Any


class UserError(ValueError):
    """Names the thing that is wrong, and the mend."""


class RunError(RuntimeError):
    """A run that cannot go on, for reasons in the run itself: `main` prints it as one sentence and exits with code 1."""


class DataLostError(RunError):
    """Images that could be read can no longer be."""


class StoppedError(Exception):
    """A run that was asked to stop and has saved: `main` prints it and exits with its code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlong, _short.maxlevel = 40, 4


def shown(value: Any) -> str:
    """A value from a file or a command line as messages show it: text in quotes; what is long or deep is cut."""
    return _short.repr(value)
