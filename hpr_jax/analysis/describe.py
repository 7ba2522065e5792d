"""Prints what a detector costs, before there is data or a device to run it on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from hpr_jax.analysis.costs import (
    ModuleCost,
    StaticShapes,
    evaluation_buckets,
    inference_memory,
    module_costs,
    static_shapes,
    total,
    training_buckets,
    training_memory,
)
from hpr_jax.analysis.text_table import print_table, text_table
from hpr_jax.data.build import wants_masks
from hpr_jax.data.loading.batch_plan import Shape
from hpr_jax.errors import UserError
from hpr_jax.losses.build import make_criterion
from hpr_jax.models.build import abstract_detector
from hpr_jax.settings import AUTO, check
from hpr_jax.training.build import with_recipe_batch
from hpr_jax.weights.checkpoint import checkpoint_config, read_meta

# Room for ground-truth boxes, assumed where config.data.max_boxes leaves it to the data: the fullest image of COCO has 93.
# Copy-paste needs twice as much.
MAX_BOXES = 100

# What the table of parameters and FLOPs counts, by the image's size.
COUNTED = """\
GFLOPs: twice the multiply-adds of the matrix products and convolutions that the detections of one {0}x{1} image depend on;
weighted sums of sampled features, norms, activations and the selection of queries do not count. Box offsets inside the
decoder count with the refiner. Branch heads, denoising and dense queries serve training alone."""
# What the tables of shapes assume, by the room for boxes and where it comes from.
ASSUMED = """\
Shapes for photographs of common sizes (640x480, 640x427, 500x375, ... in about COCO's proportions); other data get others.
Queries: matching + denoising + dense ones; {0} boxes a view at most ({1})."""

# What to say of a batch size that a run will choose.
AUTOMATIC = """
config.train.batch_size is auto: a run chooses it when it begins, for its images and the memory that is free then. Here it is
that of the recipe, {0}."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is described: a detector and its settings.

    Attributes:
      config: of the detector; with a checkpoint it stands in for the checkpoint's own, and its model must be the same.
      num_classes: of a detector without a checkpoint.
      checkpoint: a checkpoint's directory or a run's workdir, or None.
      overrides: settings (dotted key, text) in place of a checkpoint's.
    """

    config: ConfigDict | None
    num_classes: int = 80
    checkpoint: Path | None = None
    overrides: Sequence[tuple[str, str]] = ()

    def settings(self) -> tuple[ConfigDict, int]:
        """The config, and the number of classes.

        Raises:
          UserError: there is neither config nor checkpoint, or no detector or run can have these settings.
        """
        config, num_classes = self.config, self.num_classes
        if self.checkpoint is not None:
            meta = read_meta(self.checkpoint)
            config, num_classes = checkpoint_config(meta, self.overrides, config), len(meta.classes.names)
        if config is None:
            raise UserError("There is nothing to describe; give a config or a checkpoint.")
        check(config)
        make_criterion(config)
        return config, num_classes


def describe(subject: Subject) -> None:
    """Prints parameters and FLOPs, static shapes, and after compiling an estimate of the memory.

    Raises:
      UserError: see `Subject.settings`.
    """
    config, num_classes = subject.settings()
    automatic, config = config.train.batch_size == AUTO, with_recipe_batch(config)
    detector = abstract_detector(config.model, num_classes, config.compute)
    evaluation = evaluation_buckets(config)
    training = training_buckets(config)
    largest = list(evaluation)[-1]
    print(costs_table(module_costs(detector, largest, config.model.refiner.primary)))
    print(COUNTED.format(*largest))

    max_boxes = config.data.max_boxes or MAX_BOXES * (1 + wants_masks(config))
    _print_shapes("evaluation", evaluation, functools.partial(static_shapes, detector))
    _print_shapes("training", training, functools.partial(static_shapes, detector, max_boxes=max_boxes))
    source = "config.data.max_boxes" if config.data.max_boxes else "assumed: config.data.max_boxes is 0"
    print(ASSUMED.format(max_boxes, source))

    print("\nCompiling for the memory estimate, which may take minutes (Ctrl-C to leave).", flush=True)
    height, width = largest
    what = f"inference, {config.evaluate.batch_size} x {height}x{width}"
    _print_memory(what, functools.partial(inference_memory, config, detector, largest))
    height, width = largest = list(training)[-1]
    if automatic:
        print(AUTOMATIC.format(config.train.batch_size))
    views = (1 + config.augmentation.strong_views) * config.train.batch_size
    what = f"one training step, {views} x {height}x{width}"
    _print_memory(what, functools.partial(training_memory, config, detector, largest, max_boxes))


def costs_table(costs: Sequence[ModuleCost]) -> str:
    """A table of the costs of all modules, and their sum."""
    rows: list[tuple[str, ...]] = [("module", "parameters", "trained", "frozen", "GFLOPs")]
    for cost in [*costs, total(costs)]:
        counts = (f"{count:,}" for count in (cost.trained + cost.frozen, cost.trained, cost.frozen))
        rows.append((f"  {cost.name}" if cost.within else cost.name, *counts, f"{cost.flops / 1e9:,.3f}"))
    return text_table(rows)


def _print_shapes(what: str, buckets: dict[Shape, float], shapes_of: Callable[[Shape], StaticShapes]) -> None:
    rows = [(f"{what}, height x width", "images", "levels", "tokens", "queries")]
    for bucket, share in buckets.items():
        shapes = shapes_of(bucket)
        levels = " ".join(f"{h}x{w}" for h, w in shapes.levels)
        queries = f"{shapes.matching} + {shapes.denoising} + {shapes.dense}"
        rows.append((f"{bucket[0]}x{bucket[1]}", f"{share:.1%}", levels, f"{shapes.tokens:,}", queries))
    print()
    print_table(rows)


def _print_memory(what: str, estimate: Callable[[], dict[str, int]]) -> None:
    backend = jax.default_backend()
    print(f"\nMemory of {what}, on {backend}:", flush=True)
    try:
        sizes = estimate()
    except jax.errors.JaxRuntimeError as error:
        print(f"XLA cannot compile it: {str(error).splitlines()[0]}")
        return
    rows = list(sizes.items())
    analysed = "temporaries" in sizes
    if analysed:
        rows.append(("total", sum(sizes.values())))
    print_table((name, f"{size / 1e6:,.1f} MB") for name, size in rows)
    if not analysed:
        print(f"The backend {backend} does not tell the size of activations and other temporaries.")
