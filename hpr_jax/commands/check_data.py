"""Counts, checks and shows the data that a config would train on, and says whether it is fit for that.

scripts/check_data --config FILE.py[:VARIANT] [--config.section.key=value ...] [--output DIR] [--samples N]

All annotations are read and all images are opened; bars say how long that takes. Pictures of augmented images, as training
sees them, go to DIR. The last line is the verdict; the exit code is 0 if the data is fit to train on, else 2.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from hpr_jax.commands.arguments import CommandParser, Overrides, add_config
from hpr_jax.config import load_config
from hpr_jax.data.build import load_dataset, make_plan, make_views, room_for_boxes, wants_masks
from hpr_jax.data.dataset import Dataset, Problem, Record
from hpr_jax.data.images import OtherSizeError, UnreadableImageError, decode_annotated
from hpr_jax.data.loading.batches import TrainLoader
from hpr_jax.data.loading.plan import TrainPlan
from hpr_jax.data.sources.coco import clip_box
from hpr_jax.errors import UserError
from hpr_jax.inference.drawing import contact_sheet, draw, write_image
from hpr_jax.runtime.logs import log_to_console
from hpr_jax.settings import check
from hpr_jax.training.build import in_steps, warn_of_recipe

# Of the longest bar of a histogram.
BAR = 40
# So many of what is wrong are named.
NAMED = 3
SPLITS = {"train": "training", "val": "validation"}
# Areas at which COCO's small boxes end, and its medium ones.
SMALL, MEDIUM = 32**2, 96**2


class Verdict:
    """What is wrong with the data: `obstacles` that no training can go on with, and `doubts`."""

    def __init__(self):
        self.obstacles: list[str] = []
        self.doubts: list[str] = []

    def doubt(self, what: str, count: int, note: str = "") -> None:
        """Notes what there should be none of, if there is any."""
        if count:
            self.doubts.append(f"{what}: {count:,}" + (f" ({note})" if note else ""))

    @property
    def fit(self) -> bool:
        return not self.obstacles

    def __str__(self) -> str:
        if self.obstacles:
            return f"Not fit to train: {'; '.join(sentence.rstrip('.') for sentence in self.obstacles)}."
        return f"Fit to train, but: {'; '.join(self.doubts)}." if self.doubts else "Fit to train."


def check_data(config: ConfigDict, output: Path, samples: int) -> Verdict:
    """Prints what there is to know of the data, writes `samples` pictures, and returns the verdict.

    Raises:
      UserError: settings that no run can go on with.
    """
    check(config)
    warn_of_recipe(config)
    verdict = Verdict()
    datasets = _load(config, verdict)
    names, digests = {}, {}
    for split, dataset in datasets.items():
        print(f"\n{SPLITS[split]}: {dataset.name}\n  {'fingerprint':14}{dataset.fingerprint}")
        names[split] = _show_annotations(config, split, dataset, verdict)
        digests[split] = _open_images(config, split, dataset, verdict)
    if len(digests) == 2:
        _compare_splits(datasets, names, digests, verdict)
    if "train" in datasets:
        _try_training(config, datasets["train"], digests["train"], output, samples, verdict)
    print(f"\n{verdict}")
    return verdict


def _load(config: ConfigDict, verdict: Verdict) -> dict[str, Dataset]:
    """The splits whose annotations can be read, with masks."""
    datasets: dict[str, Dataset] = {}
    for split in SPLITS:
        classes = datasets["train"].classes if "train" in datasets else None
        try:
            datasets[split] = load_dataset(config.data, split, classes, masks=True)
        except (UserError, OSError) as error:
            if str(error) not in verdict.obstacles:
                verdict.obstacles.append(str(error))
    return datasets


def _line(label: str, text: str, details: Iterable[Any] = ()) -> None:
    print(f"  {label:14}{text}")
    for detail in details:
        print(f"  {'':16}{detail}")


def _first(items: Sequence[Any]) -> list[Any]:
    """The first few, and how many more there are."""
    more = len(items) - NAMED
    return [*items[:NAMED], *([f"and {more:,} more"] if more > 0 else [])]


def _spread(values: np.ndarray) -> str:
    return f"{values.min():,.0f} / {np.median(values):,.0f} / {values.max():,.0f}"


def _show_annotations(config: ConfigDict, split: str, dataset: Dataset, verdict: Verdict) -> set[str]:
    """Prints counts and problems; returns the names of the files."""
    counts, sizes, what = dataset.records.counts, dataset.sizes, SPLITS[split]
    truth = dataset.ground_truth()
    crowds = sum(bool(annotation.get("iscrowd", 0)) for annotation in truth["annotations"])
    empty = int(np.sum(counts == 0))
    _line("images", f"{len(dataset):,}, {empty:,} of them without objects")
    _line("objects", f"{counts.sum():,}, and {crowds:,} crowds")
    if not len(dataset):
        verdict.obstacles.append(f"the {what} split has no images")
        return set()
    if not counts.sum():
        (verdict.obstacles if split == "train" else verdict.doubts).append(f"the {what} split has no objects")
    fullest = dataset.records[int(np.argmax(counts))]
    _line("an image has", f"{_spread(counts)} objects (least / median / most, in {fullest.image.name})")
    _line("widths", f"{_spread(sizes[:, 1])} pixels (smallest / median / largest)")
    _line("heights", f"{_spread(sizes[:, 0])} pixels")
    if split == "train":
        small = int(np.sum(sizes.min(axis=1) < config.data.min_side))
        left_out = 0 if config.data.keep_empty else empty
        _line(
            "left out",
            f"{small:,} images with a side below {config.data.min_side} (config.data.min_side), {left_out:,} without "
            f"objects (config.data.keep_empty is {config.data.keep_empty})",
        )
    _show_boxes(dataset, truth, what, verdict)
    if split == "train":
        _show_masks(config, dataset, verdict)
    _show_classes(dataset, what, verdict)
    return _show_ids(truth, what, verdict)


def _show_boxes(dataset: Dataset, truth: Mapping[str, Any], what: str, verdict: Verdict) -> None:
    boxes = dataset.records.boxes
    if len(boxes):
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = sides.prod(axis=1)
        small, medium = int(np.sum(areas < SMALL)), int(np.sum((areas >= SMALL) & (areas < MEDIUM)))
        _line("boxes", f"{small:,} small, {medium:,} medium, {len(boxes) - small - medium:,} large (below 32², 96² pixels)")
        _line("box widths", f"{_spread(sides[:, 0])} pixels (smallest / median / largest)")
        _line("box heights", f"{_spread(sides[:, 1])} pixels")
    beyond = _beyond(dataset, truth)
    text = f"{len(beyond):,} boxes reach beyond their image"
    _line("clipped", f"{text}, by {_spread(beyond)} pixels (least / median / most)" if len(beyond) else text)
    _show_problems("dropped", "boxes", dataset.dropped)
    verdict.doubt(f"impossible {what} boxes, which are dropped", len(dataset.dropped))


def _beyond(dataset: Dataset, truth: Mapping[str, Any]) -> np.ndarray:
    """By how many pixels the boxes of objects reach beyond their image, rounded: float64 `[k]`, of those that do."""
    sizes = {image["id"]: (float(image["width"]), float(image["height"])) for image in truth["images"]}
    found = []
    for annotation in truth["annotations"]:
        width, height = sizes[annotation["image_id"]]
        box, reason = clip_box(annotation["bbox"], width, height)
        if not reason and not annotation.get("iscrowd", 0):
            left, top, w, h = map(float, annotation["bbox"])
            found.append(max(-left, -top, left + w - width, top + h - height))
    beyond = np.rint(found)
    return beyond[beyond > 0]


def _show_problems(label: str, what: str, problems: Sequence[Problem]) -> None:
    reasons = collections.Counter(problem.reason for problem in problems)
    details = []
    for reason, count in reasons.most_common():
        details.append(f"{count:,} for what {reason}:")
        details += [f"  {item}" for item in _first([problem.subject for problem in problems if problem.reason == reason])]
    _line(label, f"{len(problems):,} {what}", details)


def _show_masks(config: ConfigDict, dataset: Dataset, verdict: Verdict) -> None:
    masked, objects = dataset.count_masks()
    _line("masks", f"{masked:,} of {objects:,} objects have one")
    _show_problems("malformed", "masks", dataset.unmasked)
    if not wants_masks(config):
        return
    verdict.doubt("malformed masks, which are dropped", len(dataset.unmasked))
    if objects and not masked:
        verdict.doubts.append("without masks nothing is copied and pasted")
    elif masked < objects:
        verdict.doubt("objects without a mask, which are not pasted", objects - masked)


def _show_classes(dataset: Dataset, what: str, verdict: Verdict) -> None:
    names = dataset.classes.names
    counts = np.bincount(dataset.records.labels, minlength=len(names))
    width, most = max(map(len, names)), max(int(counts.max()), 1)
    rows = [f"{name:{width}} {count:9,} {'#' * -(-BAR * int(count) // most)}" for name, count in zip(names, counts)]
    _line("classes", f"{len(names):,}, by their number of objects:", rows)
    absent = [name for name, count in zip(names, counts) if not count]
    if absent:
        _line("absent", f"{len(absent):,} classes without any object", absent)
        verdict.doubt(f"classes without {what} objects", len(absent), ", ".join(_first(absent)))


def _show_ids(truth: Mapping[str, Any], what: str, verdict: Verdict) -> set[str]:
    ids = collections.Counter(annotation.get("id") for annotation in truth["annotations"])
    again = sum(count - 1 for count in ids.values())
    names = collections.Counter(str(image["file_name"]) for image in truth["images"])
    double = [name for name, count in names.items() if count > 1]
    if again:
        _line("ids", f"{again:,} annotations have no id of their own; here it does not matter, other tools confuse them")
    if double:
        _line("names", f"{len(double):,} file names are listed more than once:", _first(double))
        verdict.doubt(f"{what} file names listed more than once", len(double))
    return set(names)


def _open_images(config: ConfigDict, split: str, dataset: Dataset, verdict: Verdict) -> list[str]:
    """Decodes all images; returns the digest of each file, "" where there is no image of the annotated size."""
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(config.data.threads) as pool:
        opened = pool.map(_open_image, dataset.records)
        found = list(tqdm(opened, total=len(dataset), desc=f"{SPLITS[split]} images", unit="image", leave=False))
    seconds = time.perf_counter() - began
    _line("files", f"{len(found):,} images opened in {seconds:.1f} s, {len(found) / max(seconds, 1e-9):,.0f} a second")
    note = "others take their place" if split == "train" else "what is on them counts as not found"
    for kind in ("missing", "unreadable", "of another size"):
        sentences = [sentence for _, failure, sentence in found if failure == kind]
        _line("", f"{len(sentences):,} {kind}", _first(sentences))
        verdict.doubt(f"{SPLITS[split]} images {kind}", len(sentences), note)
    digests = [digest for digest, _, _ in found]
    copies = collections.defaultdict(list)
    for digest, record in zip(digests, dataset.records):
        if digest:
            copies[digest].append(record.image.name)
    double = [" = ".join(names) for names in copies.values() if len(names) > 1]
    _line("copies", f"{len(double):,} images are in the split more than once, byte by byte", _first(double))
    verdict.doubt(f"{SPLITS[split]} images that are there more than once", len(double))
    return digests


def _open_image(record: Record) -> tuple[str, str, str]:
    """Digest of an image's file, or "" and what is wrong with it: a kind, and a sentence."""
    try:
        data = record.image.read()
    except UnreadableImageError as error:
        return "", "missing", str(error)
    try:
        decode_annotated(data, record.image, record.height, record.width)
    except OtherSizeError as error:
        return "", "of another size", str(error)
    except UnreadableImageError as error:
        return "", "unreadable", str(error)
    return hashlib.sha256(data).hexdigest(), "", ""


def _compare_splits(
    datasets: Mapping[str, Dataset], names: Mapping[str, set[str]], digests: Mapping[str, list[str]], verdict: Verdict
) -> None:
    both = sorted(names["train"] & names["val"])
    shared = {digest: record.image.name for digest, record in zip(digests["val"], datasets["val"].records) if digest}
    common = [shared[digest] for digest in sorted(shared.keys() & set(digests["train"]), key=shared.get)]
    print("\ntraining and validation")
    _line("same names", f"{len(both):,} file names are in both", _first(both))
    _line("same images", f"{len(common):,} images are in both, byte by byte", _first(common))
    verdict.doubt("validation images that are training images, too", len(common))


def _try_training(
    config: ConfigDict, whole: Dataset, digests: list[str], output: Path, samples: int, verdict: Verdict
) -> None:
    """Plans an epoch, and draws the first images of it."""
    dataset = whole.subset(keep_empty=config.data.keep_empty, min_side=config.data.min_side)
    usable = [digests[place] for place in dataset.records.order]
    print("\ntraining as configured")
    if dataset.records.counts.sum() == 0:
        # That there are none at all has been said.
        if whole.records.counts.sum():
            verdict.obstacles.append("no object is left to train on")
        return
    if not any(usable):
        verdict.obstacles.append("none of the training images can be read")
        return
    try:
        plan = make_plan(config, dataset)
    except UserError as error:
        verdict.obstacles.append(str(error))
        return
    views = make_views(config, dataset)
    room, most = room_for_boxes(config, dataset, views), int(dataset.records.counts.max())
    _show_plan(config, dataset, plan)
    _line("boxes a view", f"room for {room:,}; the fullest image has {most:,}")
    if room < most:
        verdict.doubts.append(f"a view has room for {room} boxes (config.data.max_boxes), and an image has {most}")
    if samples:
        _write_samples(TrainLoader(plan, views, room), dataset, output, samples)


def _show_plan(config: ConfigDict, dataset: Dataset, plan: TrainPlan) -> None:
    batches = [plan[step] for step in range(plan.steps_per_epoch)]
    shapes = collections.Counter(batch.shape for batch in batches)
    padded = sum(len(batch.slots) * batch.shape[0] * batch.shape[1] for batch in batches)
    filled = sum(slot.geometry.size[0] * slot.geometry.size[1] for batch in batches for slot in batch.slots)
    steps = in_steps(config, plan.steps_per_epoch).train.steps
    _line("images", f"{len(dataset):,}")
    _line(
        "an epoch has",
        f"{plan.steps_per_epoch:,} steps of {plan.batch_size} images; a run has {steps:,} steps, "
        f"{steps / plan.steps_per_epoch:.1f} epochs",
    )
    rows = [f"{h}x{w:<5} {shapes[h, w]:7,} batches" for h, w in plan.buckets]
    _line("shapes", f"{len(plan.buckets)}, whose padding adds {padded / filled - 1:.0%} of the pixels:", rows)


def _write_samples(loader: TrainLoader, dataset: Dataset, output: Path, samples: int) -> None:
    """Pictures of the images of the first batches, with all of their views side by side."""
    written = 0
    for step in itertools.count():
        batch = loader[step]
        count = len(batch.images) // batch.views
        for place in range(min(count, samples - written)):
            views = []
            for index in range(place, len(batch.images), count):
                height, width = batch.sizes[index]
                valid = batch.valid[index]
                center, size = np.split(batch.boxes[index][valid] * [width, height, width, height], 2, axis=1)
                labels = batch.labels[index][valid]
                names = [dataset.classes.names[label] for label in labels]
                boxes = np.concatenate([center - size / 2, center + size / 2], axis=1)
                views.append(draw(np.ascontiguousarray(batch.images[index, :height, :width]), boxes, labels, names))
            path = output / f"sample_{written:03}.jpg"
            write_image(path, np.ascontiguousarray(contact_sheet([views], height=max(view.shape[0] for view in views))))
            written += 1
        if written == samples:
            break
    kinds = "weak view, strong view" if loader.make_views.strong else "weak view"
    _line("pictures", f"{output}/sample_*.jpg: {written} images as training sees them ({kinds})")


def add_arguments(parser: CommandParser) -> None:
    add_config(parser, "what would be trained")
    parser.add_argument("--output", type=Path, default=Path("runs/check_data"), help="folder of the pictures (%(default)s)")
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
    config = load_config(arguments.config, overrides)
    log_to_console()
    return 0 if check_data(config, arguments.output, arguments.samples).fit else 2
