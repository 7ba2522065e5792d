"""Files and folders that appear under their names when they are complete, so that whatever ends a process leaves none half
written."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hpr_jax.runtime.console import interruptible

# Numbers of partial files and folders: threads may write several at once into one folder.
_numbers = itertools.count()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A context that gives the path of a file to write, which takes the place of `path` when the context ends without an
    error, and is deleted when it does not.

    Raises:
      OSError: the file cannot be written; the message names `path`.
    """
    partial = _partial(path)
    try:
        with interruptible():
            yield partial
            partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A context that gives the path of an empty folder to fill, which becomes `path` when the context ends without an error,
    and is deleted when it does not.

    Args:
      path: what does not exist, or is an empty folder.

    Raises:
      OSError: the folder cannot be written, or `path` is in use; the message names `path`.
    """
    partial = _partial(path)
    try:
        with interruptible():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            # The system takes an empty folder's place alone.
            partial.rename(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file in place of an earlier one, and makes its folder if there is none; raises as `whole_file` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_bytes(data)


def _partial(path: Path) -> Path:
    """A name beside `path` that nothing else has. It is not made of that name, which may be as long as names can be."""
    return path.with_name(f".{os.getpid()}_{next(_numbers)}.partial")
