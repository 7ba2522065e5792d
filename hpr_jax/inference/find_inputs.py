"""Finds the files of images and videos among paths that a user gave. Imports no JAX."""

from collections.abc import Sequence
from pathlib import Path

from hpr_jax.data.images import SUFFIXES
from hpr_jax.errors import UserError
from hpr_jax.inference import video


def find_inputs(inputs: Sequence[Path], *, recursive: bool = False) -> list[Path]:
    """The given files, and the files of images and videos directly inside given folders, or anywhere below them.

    Raises:
      UserError: no path is given, a path does not exist, or a folder holds neither.
    """
    if not inputs:
        raise UserError("predict needs images, videos, or folders of them.")
    suffixes = (*SUFFIXES, *video.SUFFIXES)
    files = []
    for path in inputs:
        if path.is_dir():
            below = path.glob("**/*" if recursive else "*")
            inside = sorted(file for file in below if file.suffix.lower() in suffixes and not file.is_dir())
            if not inside:
                raise UserError(
                    f"The folder {path} holds no images ({', '.join(SUFFIXES)}) and no videos"
                    + ("." if recursive else "; --recursive looks into its folders, too.")
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"There is no image, video or folder {path}.")
    return files
