"""Finds the image files among paths that a user gave. Imports no JAX."""

from collections.abc import Sequence
from pathlib import Path

from hpr_jax.data.images import SUFFIXES
from hpr_jax.errors import UserError


def find_images(inputs: Sequence[Path], *, recursive: bool = False) -> list[Path]:
    """The given files, and the image files directly inside given folders, or anywhere below them.

    Raises:
      UserError: no path is given, a path does not exist, or a folder holds no images.
    """
    if not inputs:
        raise UserError("predict needs images or folders of images.")
    files = []
    for path in inputs:
        if path.is_dir():
            below = path.glob("**/*" if recursive else "*")
            inside = sorted(file for file in below if file.suffix.lower() in SUFFIXES and not file.is_dir())
            if not inside:
                raise UserError(
                    f"The folder {path} holds no images ({', '.join(SUFFIXES)})"
                    + ("." if recursive else "; --recursive looks into its folders, too.")
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"There is no image or folder {path}.")
    return files
