"""Whether there is anything in a data set to train or to evaluate on, found out in seconds, before the first step."""

import concurrent.futures
import logging
import time
from collections import Counter

import numpy as np

from hpr_jax.data.dataset import Dataset
from hpr_jax.data.decoding import advice_on_bits, bits_if_dark
from hpr_jax.data.images import UnreadableImageError, decode_annotated
from hpr_jax.errors import UserError

log = logging.getLogger("hpr_jax")

# So many images of a split are looked at, evenly spread over it.
SAMPLE = 24
# If none of them can be read, at most so many more are, and no more after so many seconds.
MORE, SECONDS = 1000, 20.0


def check_training_data(whole: Dataset, usable: Dataset, min_side: int, threads: int) -> None:
    """Checks that a training split has objects and images that can be read, and logs which images cannot.

    Args:
      whole: the split.
      usable: the part of it that is trained on.
      min_side: shortest side of the images in that part, in pixels.
      threads: number of images that are read at a time.

    Raises:
      UserError: there is nothing to train on; the message says why.
    """
    if not usable.records.counts.sum():
        raise UserError(f"{whole.name} has no objects to train on: {why_no_objects(whole, min_side)}.")
    _warn_of_relative_boxes(whole)
    _look_at_images(usable, threads)


def check_evaluation_data(dataset: Dataset, threads: int) -> None:
    """Does for a split to evaluate on what `check_training_data` does for one to train on."""
    if not len(dataset):
        raise UserError(f"{dataset.name} lists no images to evaluate on.")
    if dataset.truth is not None and not np.any(~dataset.truth.crowd):
        raise UserError(f"{dataset.name} has no objects to evaluate on: {why_no_objects(dataset)}.")
    _warn_of_relative_boxes(dataset)
    _look_at_images(dataset, threads)


def why_no_objects(dataset: Dataset, min_side: int = 0) -> str:
    """Why nothing of a split can be trained on, as part of a sentence.

    Args:
      min_side: shortest side in pixels of images that are trained on.
    """
    if not len(dataset):
        return "it lists no images"
    small = dataset.records.counts[dataset.sizes.min(axis=1) < min_side]
    reasons = [f"{count:,} boxes are left out, each of which {why}" for why, count in _dropped(dataset).most_common()]
    if small.sum():
        reasons.append(
            f"{small.sum():,} objects are in images with a side below {min_side} pixels, as config.data.min_side asks for"
        )
    if dataset.truth is not None and dataset.truth.crowd.any():
        reasons.append(f"annotations that are crowds: {dataset.truth.crowd.sum():,}")
    if _relative(dataset):
        reasons.append("no box reaches beyond 1: are they relative to the image? COCO's boxes are in pixels")
    return "; ".join(reasons) or "none of its images has an annotation"


def too_few_queries(dataset: Dataset, queries: int) -> str:
    """A sentence about images that have more objects than the detector has queries; "" if there are none."""
    counts = dataset.records.counts
    if not len(counts) or counts.max() <= queries:
        return ""
    fullest = dataset.records[int(np.argmax(counts))].image.name
    return (
        f"{np.sum(counts > queries):,} images of {dataset.name} have more objects than config.model.queries.count, "
        f"{queries:,}, and a query finds one object at most; {fullest} has {counts.max():,}."
    )


def _dropped(dataset: Dataset) -> Counter[str]:
    return Counter(problem.reason for problem in dataset.dropped_boxes)


def _relative(dataset: Dataset) -> bool:
    """Whether all boxes lie between 0 and 1, as boxes in other formats do."""
    boxes = dataset.truth.boxes if dataset.truth is not None else np.zeros((0, 4))
    return bool(len(boxes)) and bool(np.all((boxes >= 0) & (boxes <= 1)))


def _warn_of_relative_boxes(dataset: Dataset) -> None:
    if _relative(dataset):
        log.warning("No box of %s reaches beyond 1: are they relative to the image? COCO's are in pixels.", dataset.name)


def _look_at_images(dataset: Dataset, threads: int) -> None:
    """Reads a sample of the images; tells of those that cannot be read and of dark ones with samples of 16 bits, and refuses
    the data set if none can be read."""
    count = len(dataset)
    sample = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).round().astype(int)).tolist()
    others = [index for index in range(count) if index not in set(sample)][:MORE]
    deadline = time.monotonic() + SECONDS
    unreadable: list[str] = []
    readable = 0
    # The numbers of bits that dark images use.
    dark: list[int] = []

    def look(index: int) -> str | None:
        """What is wrong with an image, "" if nothing is, None if there is no time to look."""
        if time.monotonic() > deadline:
            return None
        record = dataset.records[index]
        try:
            data = record.image.read()
            pixels = decode_annotated(data, record.image, record.height, record.width)
        except UnreadableImageError as error:
            return str(error)
        if bits := bits_if_dark(data, pixels):
            dark.append(bits)
        return ""

    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        for indices in (sample, *([index] for index in others)):
            for problem in pool.map(look, indices):
                readable += problem == ""
                unreadable += [problem] if problem else []
            if readable or time.monotonic() > deadline:
                break
    looked = readable + len(unreadable)
    if not readable and unreadable:
        which = f"None of the {count:,} images" if looked == count else f"None of {looked:,} images that were looked at"
        raise UserError(f"{which} of {dataset.name} can be read, like: {unreadable[0]}.")
    if looked < len(sample):
        log.warning("Reading %d images of %s took %.0f s: their folder is slow.", looked, dataset.name, SECONDS)
    if unreadable:
        log.warning(
            "%d of %d images of %s that were looked at cannot be read, like: %s. `check-data` looks at all.",
            len(unreadable),
            looked,
            dataset.name,
            unreadable[0],
        )
    if dark:
        log.warning("%s.", dark_images(len(dark), looked, max(dark), dataset.name))


def dark_images(count: int, looked: int, bits: int, name: str) -> str:
    """A sentence, without its full stop, about images with samples of 16 bits that are dark.

    Args:
      count: their number.
      looked: number of images that were looked at.
      bits: number of bits that the largest of all their samples takes.
      name: of the split.
    """
    return f"{count:,} of {looked:,} images of {name} have samples of 16 bits, and are dark: {advice_on_bits(bits)}"
