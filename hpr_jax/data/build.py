"""The data of a config: its sections `data` and `augmentation` are read here.

What `config.data.directory` holds is recognised by `sources/recognize.py`, where new formats of data sets are added. Formats
whose splits are named by settings are in `FORMATS`: `Format(is_coco, load_coco, ("images", "annotations"))` gives the two
functions the settings `config.data.train_images` and `train_annotations`, or `val_images` and `val_annotations`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hpr_jax.data.augmentation.copy_paste import MAX_PASTED
from hpr_jax.data.augmentation.crop_resize_flip import Geometry, draw_large_scale, draw_weak
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.dataset import Classes, Dataset
from hpr_jax.data.decoding import MOST_BITS
from hpr_jax.data.images import ImagesOfFewerBits
from hpr_jax.data.loading.batch_plan import Shape, TrainPlan, choose_buckets
from hpr_jax.data.loading.repeats import repeat_factors
from hpr_jax.data.sources.coco import is_coco, load_coco
from hpr_jax.data.sources.recognize import names_leave_open, recognize, unrecognized
from hpr_jax.data.sources.source import describe
from hpr_jax.data.sources.tfds import find_below, is_tfds, load_tfds
from hpr_jax.errors import UserError

log = logging.getLogger("hpr_jax")


@dataclasses.dataclass(frozen=True)
class Format:
    """A format in which data sets are stored.

    Attributes:
      is_format: (directory, *names) -> whether a directory has this format.
      load: (directory, *names, classes, masks=bool) -> a split; see `load_coco`.
      settings: settings of the section `data` that the names come from, without the prefix `train_` or `val_`.
    """

    is_format: Callable[..., bool]
    load: Callable[..., Dataset]
    settings: tuple[str, ...]

    def names(self, settings: Mapping[str, Any], split: str) -> list[str]:
        """The names of the split "train" or "val"."""
        return [settings[f"{split}_{name}"] for name in self.settings]


# A directory is read in the first format that it has.
FORMATS = (
    Format(is_tfds, load_tfds, ("split",)),
    Format(is_coco, load_coco, ("images", "annotations")),
)


def load_dataset(settings: Mapping[str, Any], split: str, classes: Classes | None = None, *, masks: bool = False) -> Dataset:
    """Reads all annotations of the split "train" or "val".

    Args:
      settings: section `data` of a config.
      classes: classes of the training split or a checkpoint, which the split's must be. None: the split's are taken.
      masks: whether to read masks, too.

    Raises:
      UserError: there is no such data set, or its annotations are not as they should be.
    """
    dataset = _load(settings, split, classes, masks=masks)
    bits, records = settings["image_bits"], dataset.records
    if bits == MOST_BITS:
        return dataset
    images = ImagesOfFewerBits(records.images, bits)
    return dataclasses.replace(dataset, records=dataclasses.replace(records, images=images))


def _load(settings: Mapping[str, Any], split: str, classes: Classes | None, *, masks: bool) -> Dataset:
    """A split in whatever format its directory has."""
    directory = Path(settings["directory"]).expanduser()
    left_open = names_leave_open(directory, settings)
    source = recognize(directory) if left_open else None
    if source is not None:
        return source.load(split, settings["val_fraction"], classes, masks=masks)
    for form in FORMATS:
        names = form.names(settings, split)
        if form.is_format(directory, *names):
            return form.load(directory, *names, classes, masks=masks)
    version = find_below(directory)
    if version:
        raise UserError(f"{directory} has TFDS directories below it; set --config.data.directory={version}.")
    if left_open:
        raise UserError(unrecognized(directory))
    # The settings name a COCO folder; the error says what of it is missing.
    return load_coco(directory, settings[f"{split}_images"], settings[f"{split}_annotations"], classes, masks=masks)


def load_training_data(config: ConfigDict) -> tuple[Dataset, Dataset]:
    """The training and the validation split, with all of their images. Logs what the data was recognised as."""
    train = load_dataset(config.data, "train", masks=wants_masks(config))
    val = load_dataset(config.data, "val", train.classes)
    log.info("%s.", describe_data(config, train=train, val=val))
    return train, val


def describe_data(config: ConfigDict, **splits: Dataset) -> str:
    """What the data of a config was recognised as, with what was read of it: `train`, `val` or both."""
    return describe(Path(config.data.directory).expanduser(), splits.get("train"), splits.get("val"))


def wants_masks(config: ConfigDict) -> bool:
    """Whether training uses the masks of its data set."""
    return config.augmentation.kind == "lsj" and config.augmentation.lsj.copy_paste


def make_plan(config: ConfigDict, dataset: Dataset) -> TrainPlan:
    """The batches of a run. Their buckets are chosen for the sizes that a trial epoch draws.

    Raises:
      UserError: the data set has fewer images than a batch.
    """
    batch_size = config.train.batch_size
    if len(dataset) < batch_size:
        raise UserError(
            f"{dataset.name} has {len(dataset)} images to train on, fewer than config.train.batch_size "
            f"{batch_size}; lower it, or set --config.data.keep_empty=True if images without objects shall count."
        )
    repeats = None
    if config.data.repeat_threshold:
        repeats = repeat_factors(*dataset.records.objects(), len(dataset), config.data.repeat_threshold)
    return TrainPlan(
        _draw_geometries(config, dataset),
        len(dataset),
        batch_size=batch_size,
        buckets=training_shapes(config, dataset),
        seed=config.train.seed,
        repeats=repeats,
    )


def training_shapes(config: ConfigDict, dataset: Dataset) -> list[Shape]:
    """The buckets of a run, smallest first, for the sizes that a trial epoch draws."""
    settings, sizes = config.augmentation, dataset.sizes
    trial = _draw_geometries(config, dataset)(np.random.default_rng((config.train.seed, 2**31)))
    largest = [] if settings.kind == "lsj" else _largest_shapes(settings, sizes)
    return choose_buckets(np.array([geometry.size for geometry in trial]), config.data.buckets, largest)


def _draw_geometries(config: ConfigDict, dataset: Dataset) -> Callable[[np.random.Generator], list[Geometry]]:
    """What draws the geometries of an epoch."""
    draw = draw_large_scale if config.augmentation.kind == "lsj" else draw_weak
    return functools.partial(draw, dataset.sizes, config.augmentation.to_dict())


def _largest_shapes(settings: ConfigDict, sizes: np.ndarray) -> list[Shape]:
    """The largest shapes that any epoch can draw, for landscape and portrait images; crops can be either."""
    side, max_side = max(settings.sides), settings.max_side
    crops, landscape = settings.crop > 0, sizes[:, 0] <= sizes[:, 1]
    largest = [(min(side, max_side), max_side)] * bool(crops or landscape.any())
    return largest + [(max_side, min(side, max_side))] * bool(crops or not landscape.all())


def make_views(config: ConfigDict, dataset: Dataset) -> ViewMaker:
    """What makes the views of an image. Warns if objects cannot be pasted because masks are missing."""
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
    """The number of boxes that every view has room for: `config.data.max_boxes`, or enough for all if that is 0."""
    return most_boxes(config, dataset, pasting=make_views.draw_donor is not None)


def most_boxes(config: ConfigDict, dataset: Dataset, *, pasting: bool) -> int:
    """What `room_for_boxes` gives if objects are pasted or not."""
    most = max(1, int(dataset.records.counts.max()))
    pasted = min(most, MAX_PASTED - 1) if pasting else 0
    return config.data.max_boxes or most + pasted
