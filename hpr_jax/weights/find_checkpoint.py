"""Which checkpoint a path stands for: of a run's workdir the best one, else the newest. Imports no JAX."""

import logging
from pathlib import Path

from hpr_jax.errors import UserError

# Folders of a workdir: the latest checkpoints, from which the run goes on, and the one with the best AP.
LATEST, BEST = "checkpoints", "best"
# Part of the names of folders that are being written or deleted.
PARTIAL = ".partial"
# End of the names of checkpoints that were found to be damaged.
DAMAGED = ".damaged"
# Folders of a checkpoint.
ITEMS = ("model", "meta")


log = logging.getLogger("hpr_jax")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, which are named by their steps, oldest first; damaged ones are among them, whatever they
    lack. There are none if there is no such folder.

    Raises:
      OSError: the folder cannot be read.
    """
    found = [path for path in entries(folder) if path.name.isascii() and path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def has_begun(workdir: Path) -> bool:
    """Whether a run in a workdir has saved anything to go on from, damaged checkpoints included. What a killed run left half
    written does not count.

    Raises:
      OSError: the folder cannot be read.
    """
    folder = workdir / LATEST
    return bool(checkpoints_in(folder)) or any(path.suffix == DAMAGED for path in entries(folder))


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing if there is no such folder. A folder that is there and cannot be read is an OSError, and
    must not be taken for an empty one."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def find_checkpoint(path: Path) -> Path:
    """Finds the checkpoint that a path stands for.

    Args:
      path: the directory of one checkpoint; or a directory of checkpoints, for the newest in it; or a workdir, for its best
        checkpoint, or the newest if there is no best one yet.

    Raises:
      UserError: there is no checkpoint.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise UserError(f"There is no checkpoint in {path}, which {'is a file' if path.exists() else 'does not exist'}.")
    if any((path / item).is_dir() for item in ITEMS):
        return path
    for folder in (path / BEST, path / LATEST, path):
        if found := checkpoints_in(folder):
            return found[-1]
        damaged = [one.name for one in entries(folder) if one.name.endswith(DAMAGED)]
        if damaged:
            log.warning("In %s are damaged checkpoints alone: %s.", folder, ", ".join(sorted(damaged)))
    raise UserError(f"There is no checkpoint in {path}; give a run's workdir or one checkpoint's directory.")
