"""Data sets by where they are kept: a COCO folder, or a TFDS directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpr_jax.data.dataset import Classes, Dataset
from hpr_jax.data.sources.coco import load_coco
from hpr_jax.data.sources.tfds import load_tfds
from hpr_jax.errors import UserError

# What TFDS writes into each of its directories.
_TFDS_FILE = "dataset_info.json"


def load_dataset(settings: Mapping[str, Any], split: str, classes: Classes | None = None, *, masks: bool = False) -> Dataset:
    """The whole split "train" or "val".

    Args:
      settings: section `data` of a config.
      classes: those of the training split or a checkpoint; the data set's own when None.
      masks: whether to read masks, too.

    Raises:
      UserError: there is no such data set, or its annotations are not as they should be.
    """
    directory = Path(settings["directory"])
    if (directory / _TFDS_FILE).is_file():
        return load_tfds(directory, settings[f"{split}_split"], classes, masks=masks)
    images, annotations = settings[f"{split}_images"], settings[f"{split}_annotations"]
    if not (directory / annotations).exists():
        # As for `tfds.load`, the folder above may have been given.
        for pattern in ("*", "*/*", "*/*/*"):
            for file in directory.glob(f"{pattern}/{_TFDS_FILE}"):
                raise UserError(f"{directory} has TFDS directories below it; set --config.data.directory={file.parent}.")
    return load_coco(directory, images, annotations, classes, masks=masks)
