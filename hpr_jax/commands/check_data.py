"""Counts, checks and shows the data that a config would train on, and says whether it is fit for that.

All annotations are read and all images are opened; bars say how long that takes. Pictures of augmented images, as training
sees them, go to a folder. The last line is the verdict; the exit code is 0 if the data is fit to train on, else 2.

example:
  python -m hpr_jax.main check-data --config configs/ddq.py --data DIR --output runs/check_data
"""

import itertools
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.analysis.data_verdict import SPLITS, Verdict, first_few
from hpr_jax.analysis.dataset import (
    MISSING,
    OTHER_SIZE,
    UNREADABLE,
    AnnotationFacts,
    BoxFacts,
    OpenedImage,
    Overlap,
    PlanFacts,
    Spread,
    annotation_facts,
    by_reason,
    compare_splits,
    count_below,
    find_copies,
    open_images,
    plan_facts,
    training_obstacle,
)
from hpr_jax.commands.arguments import CommandParser, Overrides, add_config, add_data, path, with_data
from hpr_jax.config import load_config
from hpr_jax.data.build import describe_data, load_dataset, make_plan, make_views, room_for_boxes
from hpr_jax.data.dataset import Dataset, Problem
from hpr_jax.data.loading.batches import TrainLoader
from hpr_jax.errors import UserError
from hpr_jax.inference.drawing import contact_sheet, write_image
from hpr_jax.inference.sheets import draw_view
from hpr_jax.runtime.logs import log_to_console
from hpr_jax.settings import AUTO, check

# The longest bar of the histogram of classes has so many characters.
BAR = 40


def check_data(config: ConfigDict, output: Path, samples: int) -> Verdict:
    """Prints what there is to know about the data of a config, and returns the verdict.

    Args:
      output: folder of the pictures.
      samples: number of training images that are drawn, with all of their views.

    Raises:
      UserError: the settings are such that no run could use them.
    """
    check(config)
    # Imported here, since it imports JAX, and mistakes in settings are answered before that.
    from hpr_jax.training.build import warn_of_recipe

    warn_of_recipe(config)
    verdict = Verdict()
    datasets = _load(config, verdict)
    if datasets:
        print(f"{describe_data(config, **datasets)}.")
    facts: dict[str, AnnotationFacts] = {}
    images: dict[str, list[OpenedImage]] = {}
    for split, dataset in datasets.items():
        print(f"\n{SPLITS[split]}: {dataset.name}\n  {'fingerprint':14}{dataset.fingerprint}")
        facts[split] = annotation_facts(dataset)
        _print_annotations(config, split, dataset, facts[split])
        verdict.judge_annotations(config, split, dataset, facts[split])
        images[split] = _open_images(config, split, dataset)
        verdict.judge_images(split, images[split])
    if len(datasets) == len(SPLITS):
        overlap = compare_splits(facts["train"], facts["val"], images["train"], images["val"])
        _print_overlap(overlap)
        verdict.judge_overlap(overlap)
    if "train" in datasets:
        loader = _try_training(config, datasets["train"], images["train"], verdict)
        if loader and samples:
            _write_pictures(loader, output, samples)
    print(f"\n{verdict}")
    return verdict


def _load(config: ConfigDict, verdict: Verdict) -> dict[str, Dataset]:
    """The splits whose annotations can be read, with masks; what prevents the others is an obstacle."""
    datasets: dict[str, Dataset] = {}
    for split in SPLITS:
        classes = datasets["train"].classes if "train" in datasets else None
        try:
            datasets[split] = load_dataset(config.data, split, classes, masks=True)
        except (UserError, OSError) as error:
            if str(error) not in verdict.obstacles:
                verdict.obstacles.append(str(error))
    return datasets


def _print_line(label: str, text: str, details: Iterable[str] = ()) -> None:
    print(f"  {label:14}{text}")
    for detail in details:
        print(f"  {'':16}{detail}")


def _in_words(spread: Spread) -> str:
    return f"{spread.least:,.0f} / {spread.median:,.0f} / {spread.most:,.0f}"


def _print_annotations(config: ConfigDict, split: str, dataset: Dataset, facts: AnnotationFacts) -> None:
    _print_line("images", f"{facts.images:,}, {facts.empty:,} of them without objects")
    _print_line("objects", f"{facts.objects:,}, and {facts.crowds:,} crowds")
    if not facts.images:
        return
    _print_line("an image has", f"{_in_words(facts.objects_per_image)} objects (least / median / most, in {facts.fullest})")
    _print_line("widths", f"{_in_words(facts.widths)} pixels (smallest / median / largest)")
    _print_line("heights", f"{_in_words(facts.heights)} pixels")
    if split == "train":
        small = count_below(dataset, config.data.min_side)
        left_out = 0 if config.data.keep_empty else facts.empty
        _print_line(
            "left out",
            f"{small:,} images with a side below {config.data.min_side} (config.data.min_side), {left_out:,} without "
            f"objects (config.data.keep_empty is {config.data.keep_empty})",
        )
    _print_boxes(facts.boxes)
    _print_problems("dropped", "boxes", dataset.dropped_boxes)
    if split == "train":
        masked, objects = dataset.count_masks()
        _print_line("masks", f"{masked:,} of {objects:,} objects have one")
        _print_problems("malformed", "masks", dataset.dropped_masks)
    _print_classes(dataset.classes.names, facts)
    if facts.repeated_ids:
        _print_line(
            "ids",
            f"{facts.repeated_ids:,} annotations have no id of their own; here it does not matter, other tools confuse them",
        )
    if facts.repeated_names:
        count = len(facts.repeated_names)
        _print_line("names", f"{count:,} file names are listed more than once:", first_few(facts.repeated_names))


def _print_boxes(boxes: BoxFacts) -> None:
    if boxes.small + boxes.medium + boxes.large:
        counts = f"{boxes.small:,} small, {boxes.medium:,} medium, {boxes.large:,} large"
        _print_line("boxes", f"{counts} (below 32², 96² pixels)")
        _print_line("box widths", f"{_in_words(boxes.widths)} pixels (smallest / median / largest)")
        _print_line("box heights", f"{_in_words(boxes.heights)} pixels")
    text = f"{boxes.clipped:,} boxes reach beyond their image"
    if boxes.clipped:
        text += f", by {_in_words(boxes.beyond)} pixels (least / median / most)"
    _print_line("clipped", text)


def _print_problems(label: str, what: str, problems: Sequence[Problem]) -> None:
    details = []
    for reason, subjects in by_reason(problems).items():
        details.append(f"{len(subjects):,} for what {reason}:")
        details += [f"  {subject}" for subject in first_few(subjects)]
    _print_line(label, f"{len(problems):,} {what}", details)


def _print_classes(names: Sequence[str], facts: AnnotationFacts) -> None:
    counts = facts.class_counts
    width, most = max(map(len, names)), max(*counts, 1)
    rows = [f"{name:{width}} {count:9,} {'#' * -(-BAR * count // most)}" for name, count in zip(names, counts)]
    _print_line("classes", f"{len(names):,}, by their number of objects:", rows)
    if facts.absent:
        _print_line("absent", f"{len(facts.absent):,} classes without any object", facts.absent)


def _open_images(config: ConfigDict, split: str, dataset: Dataset) -> list[OpenedImage]:
    """Opens all images of a split, and prints what that has shown."""
    began = time.perf_counter()
    opened = open_images(dataset, config.data.threads)
    images = list(tqdm(opened, total=len(dataset), desc=f"{SPLITS[split]} images", unit="image", leave=False))
    seconds = time.perf_counter() - began
    rate = len(images) / max(seconds, 1e-9)
    _print_line("files", f"{len(images):,} images opened in {seconds:.1f} s, {rate:,.0f} a second")
    for failure in (MISSING, UNREADABLE, OTHER_SIZE):
        sentences = [image.sentence for image in images if image.failure == failure]
        _print_line("", f"{len(sentences):,} {failure}", first_few(sentences))
    copies = [" = ".join(names) for names in find_copies(images)]
    _print_line("copies", f"{len(copies):,} images are in the split more than once, byte by byte", first_few(copies))
    return images


def _print_overlap(overlap: Overlap) -> None:
    names, images = overlap.names, overlap.images
    print("\ntraining and validation")
    _print_line("same names", f"{len(names):,} file names are in both", first_few(names))
    _print_line("same images", f"{len(images):,} images are in both, byte by byte", first_few(images))


def _try_training(
    config: ConfigDict, dataset: Dataset, images: Sequence[OpenedImage], verdict: Verdict
) -> TrainLoader | None:
    """Plans an epoch, and prints the plan. Returns what loads the batches; None if the data cannot be trained on."""
    usable = dataset.subset(keep_empty=config.data.keep_empty, min_side=config.data.min_side)
    print("\ntraining as configured")
    if not dataset.records.counts.sum():
        # The verdict says already that there are no objects.
        return None
    obstacle = training_obstacle(images, usable)
    if obstacle:
        verdict.obstacles.append(obstacle)
        return None
    if not any(image.digest for image in images):
        # The verdict says already that no image can be read.
        return None
    from hpr_jax.training.build import with_recipe_batch

    automatic, config = config.train.batch_size == AUTO, with_recipe_batch(config)
    try:
        plan = make_plan(config, usable)
    except UserError as error:
        verdict.obstacles.append(str(error))
        return None
    views = make_views(config, usable)
    room, most = room_for_boxes(config, usable, views), int(usable.records.counts.max())
    _print_plan(config, plan_facts(plan), len(usable))
    if automatic:
        _print_line("batch size", "auto: a run chooses it when it begins; here it is the recipe's")
    _print_line("boxes a view", f"room for {room:,}; the fullest image has {most:,}")
    verdict.judge_room(room, most)
    return TrainLoader(plan, views, room)


def _print_plan(config: ConfigDict, epoch: PlanFacts, images: int) -> None:
    from hpr_jax.training.build import in_steps

    steps = in_steps(config, epoch.steps).train.steps
    _print_line("images", f"{images:,}")
    run_length = f"{steps:,} steps, {steps / epoch.steps:.1f} epochs"
    _print_line("an epoch has", f"{epoch.steps:,} steps of {epoch.images_per_step} images; a run has {run_length}")
    rows = [f"{height}x{width:<5} {count:7,} batches" for (height, width), count in epoch.batches.items()]
    _print_line("shapes", f"{len(epoch.batches)}, whose padding adds {epoch.padding:.0%} of the pixels:", rows)


def _write_pictures(loader: TrainLoader, output: Path, samples: int) -> None:
    """Writes pictures of the first images that training sees, each with its views side by side."""
    names = loader.make_views.dataset.classes.names
    written = 0
    for step in itertools.count():
        batch = loader[step]
        count = len(batch.images) // batch.views
        for place in range(min(count, samples - written)):
            views = [draw_view(batch, index, names) for index in range(place, len(batch.images), count)]
            sheet = contact_sheet([views], height=max(view.shape[0] for view in views))
            write_image(output / f"sample_{written:03}.jpg", np.ascontiguousarray(sheet))
            written += 1
        if written == samples:
            break
    kinds = "weak view, strong view" if loader.make_views.strong else "weak view"
    _print_line("pictures", f"{output}/sample_*.jpg: {written} images as training sees them ({kinds})")


def add_arguments(parser: CommandParser) -> None:
    add_config(parser, "what would be trained")
    add_data(parser)
    parser.add_argument("--output", type=path, default=Path("runs/check_data"), help="folder of the pictures (%(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="pictures of augmented images (default %(default)s)")


def run(arguments: Namespace, overrides: Overrides) -> int:
    """Checks as the arguments say; returns the exit code, 2 for data that no run can be trained on.

    Raises:
      UserError: with a sentence for the user.
    """
    if not arguments.config:
        raise UserError("Checking data needs --config FILE.py[:VARIANT].")
    if arguments.samples < 0:
        raise UserError(f"--samples is {arguments.samples}; it must be at least 0.")
    config = load_config(arguments.config, with_data(arguments.data, overrides))
    log_to_console()
    return 0 if check_data(config, arguments.output, arguments.samples).fit else 2
