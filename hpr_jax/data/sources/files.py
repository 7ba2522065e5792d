"""Files and folders that annotations name: they are read up to a size, and never outside of the folder of the data."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hpr_jax.data.images import SUFFIXES, open_without_waiting
from hpr_jax.errors import UserError, shown

# The annotations of one image may have at most so many bytes, and a list of images: more would take the machine's memory.
LARGEST_ANNOTATIONS, LARGEST_LIST = 8 * 2**20, 64 * 2**20


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
      UserError: the file is larger, or is something else.
      OSError: there is no such file, or it cannot be read.
    """
    # Without waiting, since a pipe without a writer would be waited for forever.
    with open(path, "rb", opener=open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path} is no regular file; put a file in its place.")
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path} has more than the {most:,} bytes that such a file may have; split or mend it.")
    return data


def read_lines(path: Path, most: int) -> list[str]:
    """The lines of a text file of at most `most` bytes, without the spaces around them.

    Raises:
      UserError: the file is too large, or is not text in UTF-8.
      OSError: there is no such file, or it cannot be read.
    """
    try:
        # Some editors of Windows begin files with a mark.
        text = read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: byte {error.start} is none; save it as UTF-8.") from None
    return [line.strip() for line in text.split("\n")]


def is_file(path: Path) -> bool:
    """Whether there is such a file, or a link to one. Names that no file can have are none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder, or a link to one. Names that no folder can have are none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def below(root: Path, path: Path) -> Path | None:
    """A path relative to the folder `root`; None if it leads out of it. Links are not followed: they are their owner's."""
    path, root = (Path(os.path.normpath(one.absolute())) for one in (path, root))
    return path.relative_to(root) if path.is_relative_to(root) else None


def find_image_files(folder: Path) -> Iterator[Path]:
    """The image files anywhere below a folder, in no order. Hidden ones are not among them."""
    for place, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(place, name)


def names_with_suffix(folder: Path, *suffixes: str) -> list[str]:
    """The names of the files directly in a folder that end so, in either case, sorted; none if there is no such folder.

    Hidden files are not among them.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(suffixes) and entry.is_file()]
    except OSError:
        return []
    return sorted(name for name in names if not name.startswith("."))


def common_folder(root: Path, files: list[Path]) -> Path:
    """The lowest folder that all files are in, which are relative to `root`."""
    return root / Path(os.path.commonpath([file.parent for file in files]))


def first_of(names: list[str]) -> str:
    """Some of many names, for a message."""
    some = ", ".join(shown(name) for name in names[:3])
    return f"{some} and {len(names) - 3} more" if len(names) > 3 else some
