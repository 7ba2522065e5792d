"""The manifest of a folder: a file in it that lists the sizes and SHA-256 digests of all its files, to find damage later."""

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the manifest of all files below the folder, and waits until it is on the disk."""
    with (folder / NAME).open("w") as file:
        json.dump({name: size_and_digest(folder / name) for name in _files(folder)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """Compares the files of a folder with its manifest.

    Returns:
      The first difference, as a clause that completes "it is damaged: "; None if there is none, or if the folder has no
      manifest, as the first checkpoints had not.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        manifest = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError, OSError):
        return f"{NAME} is damaged"
    for name, expected in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            same = tuple(size_and_digest(folder / name)) == expected
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not same:
            return f"{name} has changed since it was written"
    return None


def _files(folder: Path) -> list[str]:
    """Names of all files below the folder but the manifest, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != folder / NAME)


def size_and_digest(path: Path) -> tuple[int, str]:
    """Size in bytes, and SHA-256 digest of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
