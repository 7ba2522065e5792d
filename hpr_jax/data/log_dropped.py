"""Log lines about the annotations of a data set that are left out."""

import logging

from hpr_jax.data.dataset import Dataset

log = logging.getLogger("hpr_jax")


def log_dropped(dataset: Dataset) -> None:
    """Logs how many boxes and masks of a data set are impossible, and names each of them."""
    for what, problems in (("boxes", dataset.dropped_boxes), ("masks", dataset.dropped_masks)):
        if problems:
            log.warning("%d impossible %s dropped from %s:", len(problems), what, dataset.name)
        for problem in problems:
            log.warning("  %s", problem)
