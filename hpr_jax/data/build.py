"""Data sets by where they are kept: a COCO folder, or a TFDS directory."""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hpr_jax.data.augmentation.copy_paste import MAX_PASTED
from hpr_jax.data.augmentation.geometry import Geometry, draw_large_scale, draw_weak
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.dataset import Classes, Dataset
from hpr_jax.data.loading.buckets import Shape, choose_buckets
from hpr_jax.data.loading.plan import TrainPlan
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


def load_training_data(config: ConfigDict) -> tuple[Dataset, Dataset]:
    """The whole training and validation splits."""
    train = load_dataset(config.data, "train", masks=wants_masks(config))
    return train, load_dataset(config.data, "val", train.classes)


log = logging.getLogger("hpr_jax")


def wants_masks(config: ConfigDict) -> bool:
    """Whether training wants the masks of its data set."""
    return config.augmentation.kind == "lsj" and config.augmentation.lsj.copy_paste


def make_plan(config: ConfigDict, dataset: Dataset) -> TrainPlan:
    """The batches of a run; its buckets suit the sizes of a trial epoch."""
    settings, sizes, batch_size = config.augmentation, dataset.sizes, config.train.batch_size
    if len(dataset) < batch_size:
        raise UserError(
            f"{dataset.name} has {len(dataset)} images to train on, fewer than config.train.batch_size "
            f"{batch_size}; lower it, or set --config.data.keep_empty=True if images without objects shall count."
        )
    draw = functools.partial(_draw(settings), sizes, settings.to_dict())
    trial = np.array([g.size for g in draw(np.random.default_rng((config.train.seed, 2**31)))])
    buckets = choose_buckets(trial, config.data.buckets, [] if settings.kind == "lsj" else _largest(settings, sizes))
    return TrainPlan(draw, len(dataset), batch_size=batch_size, buckets=buckets, seed=config.train.seed)


def _draw(settings: ConfigDict) -> Callable[..., list[Geometry]]:
    return draw_large_scale if settings.kind == "lsj" else draw_weak


def _largest(settings: ConfigDict, sizes: np.ndarray) -> list[Shape]:
    """The largest sizes that any epoch can draw; crops come in both orientations."""
    side, max_side = max(settings.sides), settings.max_side
    crops, landscape = settings.crop > 0, sizes[:, 0] <= sizes[:, 1]
    largest = [(min(side, max_side), max_side)] * bool(crops or landscape.any())
    return largest + [(max_side, min(side, max_side))] * bool(crops or not landscape.all())


def make_views(config: ConfigDict, dataset: Dataset) -> ViewMaker:
    """How the views of an image are made; says if copy-paste cannot be had."""
    settings, draw_donor = config.augmentation, None
    if wants_masks(config):
        masked, count = dataset.count_masks()
        if not masked:
            log.warning(
                "%s has no masks: nothing is copied and pasted. Give its annotations a segmentation, or set "
                "--config.augmentation.lsj.copy_paste=False.",
                dataset.name,
            )
        else:
            draw_donor = functools.partial(draw_large_scale, settings=settings.to_dict())
            if masked < count:
                log.warning("%d of %d objects have no mask: they are trained on, but not pasted.", count - masked, count)
    return ViewMaker(dataset, strong=settings.strong_views, drop_vanished=settings.drop_vanished, draw_donor=draw_donor)


def room_for_boxes(config: ConfigDict, dataset: Dataset, make_views: ViewMaker) -> int:
    """Boxes that every view has room for."""
    most = max(1, int(dataset.records.counts.max()))
    pasted = min(most, MAX_PASTED - 1) if make_views.draw_donor else 0
    return config.data.max_boxes or most + pasted
