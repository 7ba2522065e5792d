"""The figures and images of a report: hotcoco's figures of a diagnosis, and images with their errors."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpr_jax.analysis.diagnosis import Diagnosis, Doubt, ImageErrors
from hpr_jax.data.dataset import Record
from hpr_jax.data.images import UnreadableImageError, read_annotated_image
from hpr_jax.inference.drawing import draw, encode_image, scaled
from hpr_jax.inference.figures import Theme, draw_figure, short_name
from hpr_jax.inference.sheets import corners

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# At most so many classes have a curve of their own, those with the most objects.
MOST_CURVES = 10
# A matrix of more classes than this is not written out in numbers.
MOST_COUNTED = 30
# Overlaps of the curves of precision and recall.
OVERLAPS = (0.5, 0.75)
# Height of images with errors, in pixels.
HEIGHT = 360
# Colours of right detections, false ones and missed objects.
RIGHT, FALSE, MISSED = "#3a8f4d", "#d1382c", "#2f62d9"
COLOURS = (RIGHT, FALSE, MISSED)

# Width and height of a figure with square axes, in inches: three are side by side on a wide screen.
SQUARE = (3.1, 3.4)

# Draws a figure for a light or a dark ground.
Draw = Callable[[Theme], bytes]


def _figure(plot: Callable[..., object], *arguments: Any, size: tuple[float, float], layout: Any = "constrained") -> Draw:
    """A figure that a function of hotcoco draws."""

    def draw(theme: Theme) -> bytes:
        def fill(figure: "Figure") -> None:
            plot(*arguments, theme=theme, ax=figure.subplots())

        return draw_figure(fill, *size, theme, layout)

    return draw


def overall_curves(diagnosis: Diagnosis) -> Draw:
    """Precision over recall at two overlaps, as means over the classes."""
    from hotcoco.plot import pr_curve_iou_sweep

    def plot(evaluation: Any, *, theme: Theme, ax: Any) -> None:
        pr_curve_iou_sweep(evaluation, iou_thrs=list(OVERLAPS), theme=theme, ax=ax)
        ax.legend(fontsize=8, loc="best")

    return _figure(plot, _summarized(diagnosis), size=SQUARE)


def class_curves(diagnosis: Diagnosis, overlap: float) -> Draw:
    """Precision over recall of the most frequent classes at one overlap."""
    from hotcoco.plot import pr_curve_top_n

    frequent = sorted(range(len(diagnosis.classes)), key=lambda label: -diagnosis.classes[label].objects)
    chosen = [label for label in frequent if diagnosis.classes[label].objects][:MOST_CURVES]
    ids = diagnosis.dataset.classes.category_ids
    numbers = [diagnosis.comparison.categories[ids[label]] for label in chosen]

    def plot(evaluation: Any, *, theme: Theme, ax: Any) -> None:
        pr_curve_top_n(evaluation, cat_ids=numbers, iou_thr=overlap, theme=theme, ax=ax)
        # hotcoco knows the classes by numbers.
        names = [short_name(diagnosis.classes[label].name) for label in chosen]
        ax.legend(ax.lines, names, fontsize=8, loc="best")

    return _figure(plot, _summarized(diagnosis), size=SQUARE)


def confusion(diagnosis: Diagnosis) -> Draw:
    """The matrix of what objects were taken for; of many classes, those that are confused most."""
    from hotcoco.plot import confusion_matrix

    names = [short_name(name) for name in diagnosis.confusion["cat_names"]]
    side = min(4.0 + 0.4 * len(names), 12.0)
    return _figure(confusion_matrix, {**diagnosis.confusion, "cat_names": names}, size=(side + 1, side), layout="tight")


def errors(diagnosis: Diagnosis) -> Draw:
    """How much AP each kind of error costs."""
    from hotcoco.plot import tide_errors

    return _figure(tide_errors, diagnosis.errors, size=(6.5, 3.4))


def calibration(diagnosis: Diagnosis) -> Draw:
    """Shares of right detections over scores."""
    from hotcoco.plot import reliability_diagram

    return _figure(reliability_diagram, diagnosis.calibration, size=SQUARE)


def _summarized(diagnosis: Diagnosis) -> Any:
    """hotcoco's evaluation as its figures want it: they ask for a summary, which they do not show."""
    diagnosis.comparison.evaluation.summary_lines()
    return diagnosis.comparison.evaluation


def draw_errors(diagnosis: Diagnosis, image: ImageErrors) -> bytes | None:
    """An image with right and false detections and missed objects, as a JPEG; None if it cannot be read."""
    found = [*image.right, *image.false]
    kinds = [0] * len(image.right) + [1] * len(image.false) + [2] * len(image.missed)
    captions = [_detected(diagnosis, place) for place in found]
    captions += [f"missed: {_annotated(diagnosis, place)}" for place in image.missed]
    return _draw(diagnosis, image.place, found, image.missed, kinds, captions)


def draw_doubt(diagnosis: Diagnosis, doubt: Doubt) -> bytes | None:
    """An image with a detection and what is annotated in its place, as a JPEG; None if it cannot be read."""
    annotated = [] if doubt.annotation is None else [doubt.annotation]
    captions = [f"found: {_detected(diagnosis, doubt.detection)}"]
    captions += [f"annotated: {_annotated(diagnosis, place)}" for place in annotated]
    return _draw(diagnosis, doubt.place, [doubt.detection], annotated, [1] + [2] * len(annotated), captions)


def _draw(
    diagnosis: Diagnosis,
    place: int,
    detections: Sequence[int],
    annotations: Sequence[int],
    kinds: Sequence[int],
    captions: Sequence[str],
) -> bytes | None:
    truth = diagnosis.dataset.truth
    assert truth is not None, "a split without ground truth is not diagnosed"
    image = read(diagnosis.dataset.records[place])
    if image is None:
        return None
    image, scale = scaled(image, HEIGHT)
    sides = [diagnosis.counting[one]["bbox"] for one in detections] + [truth.boxes[one] for one in annotations]
    return encode_image(draw(image, corners(sides) * scale, np.array(kinds, int), captions, COLOURS, legible=True), ".jpg")


def read(record: Record) -> np.ndarray | None:
    """The image of a record; None if it cannot be read."""
    try:
        return read_annotated_image(record.image, record.height, record.width)
    except (UnreadableImageError, OSError):
        return None


def _detected(diagnosis: Diagnosis, place: int) -> str:
    one, classes = diagnosis.counting[place], diagnosis.dataset.classes
    return f"{short_name(classes.names[classes.category_ids.index(one['category_id'])])} {one['score']:.2f}"


def _annotated(diagnosis: Diagnosis, place: int) -> str:
    truth = diagnosis.dataset.truth
    assert truth is not None, "a split without ground truth is not diagnosed"
    return short_name(diagnosis.dataset.classes.names[truth.labels[place]])
