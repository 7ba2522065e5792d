"""The sections of a report: what each says of a run, as HTML."""

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from hpr_jax.analysis import plots
from hpr_jax.analysis.diagnosis import DOUBT, DOUBTS, ERRORS, OVERLAP, Diagnosis, Doubt, ImageErrors
from hpr_jax.analysis.recipes import nearest_recipe
from hpr_jax.analysis.report_page import (
    Html,
    drawn,
    figures,
    folded,
    heading,
    join,
    paragraph,
    photograph,
    table,
)
from hpr_jax.analysis.speed import Speed
from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Dataset
from hpr_jax.inference.figures import Theme
from hpr_jax.settings import leaves
from hpr_jax.training.curves import CURVES, draw_labels
from hpr_jax.training.metric_reader import UNDEFINED, Metrics
from hpr_jax.weights.model_card import detector_name
from hpr_jax.weights.source import Source

# Images with errors that are drawn; doubts that are drawn, and that are listed.
MOST_IMAGES, MOST_DRAWN_DOUBTS, MOST_DOUBTS = 12, 6, 50
# The packages whose versions a report names.
PACKAGES = ("hpr_jax", "jax", "jaxlib", "flax", "optax", "numpy", "hotcoco", "supervision", "matplotlib")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
      workdir: the run's.
      source: the detector that is reported on, the run's best.
      train: the training split; None if it cannot be read.
      diagnosis: of the detections of the validation split.
      whole: number of images of the whole validation split, of which the diagnosis may have a part.
      metrics: what the run has written.
      speed: of the detector on this machine; None if no image can be read.
    """

    workdir: Path
    source: Source
    train: Dataset | None
    diagnosis: Diagnosis
    whole: int
    metrics: Metrics
    speed: Speed | None

    @property
    def val(self) -> Dataset:
        """The images that the diagnosis is of."""
        return self.diagnosis.dataset

    def image_name(self, place: int) -> str:
        """The name of an image, without the folder of the data."""
        folder = str(Path(self.source.config.data.directory).expanduser())
        return self.val.records[place].image.name.removeprefix(folder).lstrip("/\\")


def number(value: float, digits: int = 3) -> str:
    """A fraction, or a dash where nothing defines it."""
    return "\u2013" if value == UNDEFINED else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """A duration in words."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def training_seconds(metrics: Metrics, batch_size: int) -> float:
    """How long the steps of a run took; evaluations and pauses do not count."""
    seconds, before = 0.0, 0.0
    for line in metrics.lines:
        rate = line.get("images_per_second", 0.0)
        if rate > 0:
            seconds += max(0.0, line["step"] - before) * batch_size / rate
            before = line["step"]
    return seconds


def summary(subject: Subject) -> Html:
    """What was trained on what, how well it does, and how long it took."""
    config, source, val = subject.source.config, subject.source, subject.val
    name = detector_name(to_plain(config))
    on = f"on {len(subject.train):,} images" if subject.train is not None else "on images that cannot be read here,"
    sentences = [
        f"{name}, trained {on} of {len(val.classes.names):,} classes in {config.data.directory}, "
        f"in batches of {config.train.batch_size}."
    ]
    steps = [line["step"] for line in subject.metrics.lines]
    seconds = training_seconds(subject.metrics, config.train.batch_size)
    if steps:
        sentences.append(f"The run has taken {max(steps):,.0f} of {config.train.steps:,} steps.")
    if seconds:
        sentences.append(f"The steps took about {duration(seconds)}; evaluations and pauses are not counted.")
    metrics = subject.diagnosis.metrics
    images = (
        f"all {len(val):,} images" if len(val) == subject.whole else f"the first {len(val):,} of {subject.whole:,} images"
    )
    result = (
        f"Its best checkpoint, that of step {source.step:,}, has AP {number(metrics['AP'])}, AP50 {number(metrics['AP50'])} "
        f"and AP75 {number(metrics['AP75'])} on {images} of the validation split."
    )
    return join([paragraph(*sentences), paragraph(result), *_advice(subject)])


def _advice(subject: Subject) -> list[Html]:
    """A sentence about the score to use, and one about the error that costs most."""
    diagnosis, said = subject.diagnosis, []
    if diagnosis.threshold is not None:
        said.append(
            f"Precision and recall are balanced best with the score threshold {diagnosis.threshold:.2f}, from which on "
            "detections count in the sections about confusion and errors."
        )
    else:
        said.append("No detection is right.")
    if diagnosis.errors:
        costs = {name: diagnosis.errors["delta_ap"][name] for name in ERRORS}
        worst = max(costs, key=lambda name: costs[name])
        if costs[worst] > 0:
            said.append(f"The costliest kind of error is {worst} ({ERRORS[worst]}): it costs {costs[worst]:.3f} AP50.")
    return [paragraph(*said)]


def curves(subject: Subject) -> Html:
    """Losses, learning rate, gradients, precision and merges over the steps; labels of the splits."""
    metrics, parts = subject.metrics, []
    if metrics.broken:
        parts.append(paragraph(f"{metrics.broken:,} lines of metrics.jsonl cannot be read and are left out.", note=True))
    if not metrics.lines:
        parts.append(paragraph("The workdir has no metrics.jsonl with numbers, so there are no curves."))
    else:
        parts += [_curve(name, draw, metrics) for name, draw in CURVES.items() if draw(metrics) is not None]
    return join([*parts, heading("Labels"), _labels(subject)])


def _curve(name: str, draw: Callable[..., bytes | None], metrics: Metrics) -> Html:
    def draw_in(theme: Theme) -> bytes:
        return draw(metrics, theme) or b""

    return drawn(draw_in, f"curves: {name}", broad=True)


def _labels(subject: Subject) -> Html:
    splits = {"validation": subject.val}
    if subject.train is not None:
        splits = {"training": subject.train, **splits}
    return drawn(lambda theme: draw_labels(splits, theme), "number of objects by class")


def coco_numbers(subject: Subject) -> Html:
    """The twelve numbers."""
    rows = [(name, number(value)) for name, value in subject.diagnosis.metrics.items()]
    limits = ", ".join(map(str, subject.source.config.evaluate.max_detections))
    note = f"Of an image and a class, at most {limits} detections count. A dash: there is no such object."
    half = -(-len(rows) // 2)
    return join([figures(table(("", "value"), rows[:half]), table(("", "value"), rows[half:])), paragraph(note, note=True)])


def classes(subject: Subject) -> Html:
    """Precision by class."""
    rows = [
        (one.name, number(one.precision), number(one.precision50), f"{one.objects:,}") for one in subject.diagnosis.classes
    ]
    return table(("class", "AP", "AP50", "objects"), rows)


def precision_and_recall(subject: Subject) -> Html:
    """Curves, overall and by class."""
    diagnosis = subject.diagnosis
    by_class = [
        drawn(plots.class_curves(diagnosis, overlap), f"precision over recall by class at IoU {overlap}")
        for overlap in plots.OVERLAPS
    ]
    said = f"At most {plots.MOST_CURVES} classes are shown, those with the most objects; IoU is the overlap of boxes."
    overall = drawn(plots.overall_curves(diagnosis), "precision over recall, mean over the classes")
    return join([figures(overall, *by_class), paragraph(said, note=True)])


def confusion(subject: Subject) -> Html:
    """What objects were taken for."""
    diagnosis = subject.diagnosis
    if diagnosis.threshold is None:
        return paragraph("No detection is right, so nothing can be confused.")
    said = (
        f"A row is a class of objects, and a column what they were taken for, as shares of the row. BG is the background: "
        f"the last column are missed objects, the last row false detections. Detections count from a score of "
        f"{diagnosis.threshold:.2f} on, and match from an IoU of {OVERLAP:g} on."
    )
    truth = diagnosis.dataset.truth
    crowds = truth is not None and bool(truth.crowd.any())
    notes = [paragraph("Detections within crowds count as false here.", note=True)] if crowds else []
    names = [*diagnosis.confusion["cat_names"], "background"]
    matrix = diagnosis.confusion["matrix"]
    rows = [(name, *map(int, row)) for name, row in zip(names, matrix)]
    counts = [folded("As numbers", table(("object \\ taken for", *names), rows))] if len(names) <= plots.MOST_COUNTED else []
    return join([paragraph(said), drawn(plots.confusion(diagnosis), "confusion matrix"), *notes, *counts])


def error_kinds(subject: Subject) -> Html:
    """TIDE's errors."""
    errors = subject.diagnosis.errors
    if errors is None:
        return paragraph("There are no detections, so every object is missed.")
    rows = [
        (f"{name}: {meaning}", f"{errors['counts'][name]:,}", f"{errors['delta_ap'][name]:.3f}")
        for name, meaning in ERRORS.items()
    ]
    said = (
        f"How much higher AP50, which is {errors['ap_base']:.3f}, would be without errors of one kind (TIDE). All "
        "detections count, also those with low scores."
    )
    return join(
        [
            paragraph(said),
            drawn(plots.errors(subject.diagnosis), "AP that each kind of error costs"),
            table(("error", "number", "costs AP50"), rows),
        ]
    )


def calibration(subject: Subject) -> Html:
    """How far a score is the share of right detections."""
    found = subject.diagnosis.calibration
    if found is None:
        return paragraph("There are no detections, so there are no scores to look at.")
    said = (
        f"If scores were probabilities, the share of right detections (at IoU {OVERLAP:g}) would be the score. On average "
        f"it is off by {found['ece']:.3f} (ECE), at most by {found['mce']:.3f} (MCE)."
    )
    return join([paragraph(said), drawn(plots.calibration(subject.diagnosis), "share of right detections over the score")])


def worst_images(subject: Subject) -> Html:
    """The images with the most errors."""
    diagnosis = subject.diagnosis
    if not diagnosis.images:
        return paragraph("No image has an error.")
    said = (
        f"{len(diagnosis.images):,} of {len(subject.val):,} images have errors; these have the most. Right detections are "
        "green, false ones red, missed objects blue."
    )
    return join([paragraph(said), figures(*(_worst(subject, image) for image in diagnosis.images[:MOST_IMAGES]))])


def _worst(subject: Subject, image: ImageErrors) -> Html:
    name = subject.image_name(image.place)
    caption = f"{name}: {len(image.false)} false, {len(image.missed)} missed, {len(image.right)} right"
    return _photograph(plots.draw_errors(subject.diagnosis, image), caption)


def _photograph(picture: bytes | None, caption: str) -> Html:
    if picture is None:
        return paragraph(f"{caption} (the image cannot be read)", note=True)
    return photograph(picture, caption)


def label_errors(subject: Subject) -> Html:
    """Annotations that are probably wrong."""
    doubts, diagnosis = subject.diagnosis.doubts, subject.diagnosis
    if not doubts:
        return paragraph(f"No detection with a score of {DOUBT:g} or more contradicts the annotations.")
    said = (
        f"{len(doubts):,} detections with a score of {DOUBT:g} or more contradict the annotations. The surest ones are "
        "worth a look: either they are wrong, or the annotations are. Found boxes are red, annotated ones blue."
    )
    pictures = [
        _photograph(plots.draw_doubt(diagnosis, doubt), _doubt_caption(subject, doubt))
        for doubt in doubts[:MOST_DRAWN_DOUBTS]
    ]
    rows = [_doubt_row(subject, doubt) for doubt in doubts[:MOST_DOUBTS]]
    listed = table(("image", "found", "score", "doubt"), rows, texts=True)
    return join([paragraph(said), figures(*pictures), folded(f"The {len(rows):,} surest", listed)])


def _doubt_row(subject: Subject, doubt: Doubt) -> tuple[str, str, str, str]:
    dataset, one = subject.val, subject.diagnosis.counting[doubt.detection]
    names, truth = dataset.classes.names, dataset.truth
    found = names[dataset.classes.category_ids.index(one["category_id"])]
    reason = DOUBTS.get(doubt.kind, doubt.kind)
    if doubt.annotation is not None and truth is not None:
        reason = f"{reason}: {names[truth.labels[doubt.annotation]]}"
    return subject.image_name(doubt.place), found, f"{one['score']:.2f}", reason


def _doubt_caption(subject: Subject, doubt: Doubt) -> str:
    image, found, score, reason = _doubt_row(subject, doubt)
    return f"{image}: {found} ({score}); {reason}"


def speed(subject: Subject) -> Html:
    """How fast it detects here."""
    found = subject.speed
    if found is None:
        return paragraph("No image of the validation split can be read, so speed was not measured.")
    height, width = found.size
    return join(
        [
            table(
                ("", "median"),
                [
                    ("one image, from pixels to boxes", f"{1000 * found.latency:,.1f} ms"),
                    (f"batches of {found.batch_size}", f"{found.images_per_second:,.1f} images/s"),
                ],
            ),
            paragraph(
                f"Measured on this machine ({found.device}), with an image of {width}x{height} pixels (width x height). "
                "Reading files is not counted, and in batches resizing is not, either.",
                note=True,
            ),
        ]
    )


def settings(subject: Subject) -> Html:
    """The config, beside that of the nearest recipe."""
    config = to_plain(subject.source.config)
    name, recipe = nearest_recipe(config)
    default = dict(leaves(recipe))
    rows = [(key, value, default.get(key, "\u2013")) for key, value in leaves(config)]
    marked = [place for place, (_, value, usual) in enumerate(rows) if value != usual]
    said = (
        f"{len(marked):,} settings differ from {name}, the packaged recipe that is nearest; they are marked. Lengths in "
        "epochs have become steps."
    )
    shown = [(f"config.{key}", _shown(value), _shown(usual)) for key, value, usual in rows]
    head = ("setting", "value", name)
    different = table(head, [shown[place] for place in marked], texts=True) if marked else Html("")
    return join([paragraph(said), different, folded("All settings", table(head, shown, marked=marked, texts=True))])


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "()" if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def versions(_: Subject) -> Html:
    """What made the report."""
    rows = [("Python", platform.python_version()), ("system", platform.platform())]
    rows += [("device", f"{jax.device_count()} x {jax.devices()[0].device_kind}")]
    return table(("", "version"), [*rows, *((name, _version(name)) for name in PACKAGES)], texts=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


# The sections in their order.
SECTIONS: Mapping[str, Callable[[Subject], Html]] = {
    "Summary": summary,
    "Curves": curves,
    "COCO numbers": coco_numbers,
    "Classes": classes,
    "Precision and recall": precision_and_recall,
    "Confusion": confusion,
    "Kinds of errors": error_kinds,
    "Calibration": calibration,
    "Worst images": worst_images,
    "Probable label errors": label_errors,
    "Speed": speed,
    "Config": settings,
    "Versions": versions,
}
