"""Tells what of a data set was dropped."""

import logging

from hpr_jax.data.dataset import Dataset

log = logging.getLogger("hpr_jax")


def log_dropped(dataset: Dataset) -> None:
    """Counts and names the boxes and masks of a data set that cannot be."""
    for what, sentences in (("boxes", dataset.dropped), ("masks", dataset.unmasked)):
        if sentences:
            log.warning("%d impossible %s dropped from %s:", len(sentences), what, dataset.name)
        for sentence in sentences:
            log.warning("  %s", sentence)
