"""What the files of a folder were when it was finished: a list of their sizes and SHA-256 digests, in the folder itself."""

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Lists all files below the folder, and waits until the list is on the disk."""
    with (folder / NAME).open("w") as file:
        json.dump({name: _entry(folder / name) for name in _files(folder)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """What differs from the manifest, a clause; None if nothing does, or if there is no manifest, as in older folders."""
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
            same = tuple(_entry(folder / name)) == expected
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not same:
            return f"{name} has changed since it was written"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != folder / NAME)


def _entry(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
