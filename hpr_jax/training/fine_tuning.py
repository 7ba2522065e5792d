"""The config of a run that fine-tunes a detector: a recipe with the detector's model, losses and size of images."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hpr_jax.config import override
from hpr_jax.weights.source import open_source

# The shorter side of evaluation for which the sizes of a recipe's augmentation are made.
USUAL_SIDE = 800
# The settings of an augmentation that are lengths in pixels.
_LENGTHS = ("sides", "max_side", "crop_sides", "crop_range")


def fine_tuning_config(recipe: ConfigDict, place: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """A recipe for one detector. Images are augmented in the sizes in which the detector is used.

    Args:
      recipe: as configs/finetune.py makes it; it is changed.
      place: where the detector is, as `open_source` takes it.
      overrides: settings (dotted key, text) that are changed last.

    Raises:
      UserError: there is no detector, or a setting is wrong.
    """
    detector = open_source(place).config
    frozen = recipe.model.frozen_parts
    recipe.model, recipe.loss = detector.model, detector.loss
    recipe.model.frozen_parts = frozen
    recipe.evaluate = detector.evaluate
    recipe.train.initial_weights = str(place)
    scale = detector.evaluate.side / USUAL_SIDE
    for key in _LENGTHS:
        lengths = recipe.augmentation[key]
        scaled = tuple(max(round(length * scale), 1) for length in (lengths if isinstance(lengths, tuple) else (lengths,)))
        recipe.augmentation[key] = scaled if isinstance(lengths, tuple) else detector.evaluate.max_side
    for key, text in overrides:
        override(recipe, key, text)
    return recipe
