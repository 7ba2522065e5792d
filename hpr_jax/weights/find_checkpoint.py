"""Which checkpoint a path stands for: of a run's workdir the best one, else the newest. Imports no JAX."""

from pathlib import Path

from hpr_jax.errors import UserError

# Folders of a workdir: the latest checkpoints, from which the run goes on, and the one with the best AP.
LATEST, BEST = "checkpoints", "best"
# Part of the names of folders that are being written or deleted.
PARTIAL = ".partial"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, which are named by their steps, oldest first."""
    found = [path for path in folder.glob("*") if path.name.isdigit() and (path / "meta").is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def find_checkpoint(path: Path) -> Path:
    """Finds the checkpoint that a path stands for.

    Args:
      path: the directory of one checkpoint; or a directory of checkpoints, for the newest in it; or a workdir, for its best
        checkpoint, or the newest if there is no best one yet.

    Raises:
      UserError: there is no checkpoint.
    """
    path = path.expanduser()
    if (path / "model").is_dir() and (path / "meta").is_dir():
        return path
    for folder in (path / BEST, path / LATEST, path):
        if found := checkpoints_in(folder):
            return found[-1]
    raise UserError(f"There is no checkpoint in {path}; give a run's workdir or one checkpoint's directory.")
