"""The libraries of the extra `video`, which are imported when they are needed: `av` for files, `trackers` for tracking."""

import importlib
import importlib.util
from typing import Any

from hpr_jax.errors import UserError

_NEEDED = {"av": "Videos need", "trackers": "--track needs"}


def require(name: str) -> None:
    """Checks that a library is installed, without the time that importing it takes.

    Raises:
      UserError: it is not.
    """
    if importlib.util.find_spec(name) is None:
        raise _missing(name)


def library(name: str) -> Any:
    """A library.

    Raises:
      UserError: it is not installed, or does not work.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(name) from error


def _missing(name: str) -> UserError:
    return UserError(f'{_NEEDED[name]} the package {name}; install it with pip install "hpr_jax[video]".')
