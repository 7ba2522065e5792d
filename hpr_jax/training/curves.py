"""Figures of a run's numbers: losses, learning rate, gradients, precision, merges; and of the labels that it trains on."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from hpr_jax.data.dataset import Dataset
from hpr_jax.inference.figures import LIGHT, Theme, curve, draw_figure, finish_axes, short_name
from hpr_jax.training.metric_reader import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Most classes that the histogram of labels shows.
MOST_CLASSES = 40
# What kinds of predictions a loss is of, by the names of its terms; `layer` is that of the detections.
KINDS = {
    "layer": "detections",
    "proposals": "proposals",
    "denoising": "denoising",
    "dense": "dense",
    "dense_proposals": "dense proposals",
}
# The name of the branch whose terms have no branch in their names.
PRIMARY = "primary"


def split_term(name: str) -> tuple[str, str, int | None, str]:
    """Branch, kind, layer and loss of a term, like ("dynamic_conv", "denoising", 1, "l1") of
    `term/dynamic_conv/denoising_1/l1`; the layer is None where the kind has none."""
    *branch, kind, loss = name.removeprefix("term/").split("/")
    numbered = re.fullmatch(r"(.+)_(\d+)", kind)
    if numbered:
        return "/".join(branch) or PRIMARY, numbered[1], int(numbered[2]), loss
    return "/".join(branch) or PRIMARY, kind, None, loss


def loss_groups(metrics: Metrics) -> dict[str, dict[str, list[str]]]:
    """The terms that each curve of the figure of losses adds up: by the title of its axes and by its name."""
    groups: dict[str, dict[str, list[str]]] = {"class": {}, "branch": {}, "kind": {}}
    parts = {name: split_term(name) for name in metrics.names("term/")}
    last = max((layer for _, kind, layer, _ in parts.values() if kind == "layer" and layer is not None), default=None)
    for name, (branch, kind, layer, loss) in parts.items():
        if (branch, kind, layer) == (PRIMARY, "layer", last):
            groups["class"].setdefault(loss, []).append(name)
        if kind == "layer":
            groups["branch"].setdefault(branch, []).append(name)
        else:
            groups["kind"].setdefault(KINDS.get(kind, kind), []).append(name)
    return groups


def _draw_sums(axes: "Axes", metrics: Metrics, curves: Mapping[str, list[str]]) -> None:
    """Draws a curve for each sum of numbers that lines have in common."""
    for label, names in curves.items():
        lines = [line for line in metrics.lines if all(name in line for name in names)]
        curve(axes, [line["step"] for line in lines], [sum(line[name] for name in names) for line in lines], label)


def draw_losses(metrics: Metrics, theme: Theme = LIGHT) -> bytes:
    """Losses, as weighted in their sum: all together; class, l1 and giou of the last layer; by branch; of other queries."""
    groups = loss_groups(metrics)
    panels = [
        ("total", {"loss": ["loss"]}),
        ("last layer of the primary branch", groups["class"]),
        ("all layers, by branch", groups["branch"]),
        ("proposals, and queries of training", groups["kind"]),
    ]
    panels = [panel for panel in panels if panel[1]]

    def draw(figure: "Figure") -> None:
        for axes, (title, curves) in zip(_grid(figure, len(panels), 2), panels):
            _draw_sums(axes, metrics, curves)
            finish_axes(axes, title, y="loss")
            axes.set_ylim(bottom=0)

    return draw_figure(draw, 10, 3.4 * -(-len(panels) // 2), theme)


def draw_schedule(metrics: Metrics, theme: Theme = LIGHT) -> bytes:
    """Learning rate and gradient norm."""

    def draw(figure: "Figure") -> None:
        for axes, name in zip(_grid(figure, 2, 2), ("learning_rate", "gradient_norm")):
            curve(axes, *metrics.series(name), name, marker=None)
            finish_axes(axes, name.replace("_", " "))
        axes.set_yscale("log")
        # Powers of ten would be formulas, which figures do not have.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")

    return draw_figure(draw, 10, 3.2, theme)


def draw_precision(metrics: Metrics, theme: Theme = LIGHT) -> bytes:
    """AP by overlap and by size, of the validation split."""
    panels = {
        "AP of the validation split": ("AP", "AP50", "AP75"),
        "AP by size of the objects": ("AP_small", "AP_medium", "AP_large"),
    }

    def draw(figure: "Figure") -> None:
        for axes, (title, names) in zip(_grid(figure, 2, 2), panels.items()):
            for name in names:
                curve(axes, *metrics.series(f"val/{name}"), name.removeprefix("AP_"))
            finish_axes(axes, title, y="AP")
            axes.set_ylim(0, max(0.05, axes.get_ylim()[1]))

    return draw_figure(draw, 10, 3.2, theme)


def draw_merges(metrics: Metrics, theme: Theme = LIGHT) -> bytes | None:
    """Mean size of the weights of the merges: axes for each merge and path, a curve for each layer. None without merges."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in metrics.names("merge/"):
        _, merge, layer, path = name.split("/", 3)
        found[merge, path][layer] = name
    if not found:
        return None
    merges, paths = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    largest = max(value for layers in found.values() for name in layers.values() for value in metrics.series(name)[1])

    def draw(figure: "Figure") -> None:
        from matplotlib import colormaps

        panels = figure.subplots(len(merges), len(paths), squeeze=False, sharex=True, sharey=True)
        for row, merge in zip(panels, merges):
            for axes, path in zip(row, paths):
                layers = found[merge, path]
                for number, (layer, name) in enumerate(layers.items()):
                    part = number / max(1, len(layers) - 1)
                    # The ends of the scale would not be seen on grounds like them.
                    colour = colormaps["viridis"](0.8 * part if theme == LIGHT else 0.3 + 0.7 * part)
                    # Curves that lie on one another are seen, since those behind are wider.
                    width = 4 - 2.5 * part
                    curve(axes, *metrics.series(name), layer.replace("_", " "), color=colour, linewidth=width)
                finish_axes(axes, f"{merge}: {path}", y="mean size")
                axes.set_ylim(0, 1.15 * largest or 1)
                axes.label_outer()
                if axes is not panels[0, 0] and (legend := axes.get_legend()):
                    legend.remove()

    return draw_figure(draw, 3.4 * len(paths), 2.8 * len(merges), theme)


def draw_labels(splits: Mapping[str, Dataset], theme: Theme = LIGHT) -> bytes:
    """How many objects of each class there are: bars for the share in each split, with the numbers at their ends.

    Args:
      splits: by name; they have the same classes.
    """
    names = next(iter(splits.values())).classes.names
    counts = {split: label_counts(dataset) for split, dataset in splits.items()}
    order = np.argsort(-next(iter(counts.values())), kind="stable")[:MOST_CLASSES]
    thickness = 0.8 / len(counts)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for number, (split, count) in enumerate(counts.items()):
            share = 100 * count[order] / max(1, count.sum())
            label = f"{split}: {count.sum():,} objects in {len(splits[split]):,} images"
            places = np.arange(len(order)) + thickness * (number - (len(counts) - 1) / 2)
            bars = axes.barh(places, share, thickness, label=label)
            axes.bar_label(bars, [f"{one:,}" for one in count[order]], fontsize=7, padding=2)
        axes.set_yticks(range(len(order)), [short_name(names[index]) for index in order])
        axes.invert_yaxis()
        axes.yaxis.grid(False)
        axes.margins(x=0.1)
        more = f" (the {len(order)} most frequent of {len(names):,})" if len(order) < len(names) else ""
        finish_axes(axes, f"objects by class{more}", "share of the split's objects, %")
        # Bars of any length leave no room for a legend within the axes.
        if legend := axes.get_legend():
            legend.remove()
        figure.legend(fontsize=8, loc="outside lower center", ncols=len(counts))

    return draw_figure(draw, 8, 1.6 + 0.32 * len(order) * max(1, len(counts) / 2), theme)


def label_counts(dataset: Dataset) -> np.ndarray:
    """Number of objects of each class in the images that are taken: int64 `[K]`."""
    _, labels = dataset.records.objects()
    return np.bincount(labels, minlength=len(dataset.classes.names))


def _grid(figure: "Figure", count: int, columns: int) -> list["Axes"]:
    """So many axes, in rows."""
    rows = -(-count // columns)
    return [figure.add_subplot(rows, min(columns, count), number + 1) for number in range(count)]


# The figures of `metrics.jsonl` by the names of their files; None where a run has nothing to show.
CURVES: dict[str, Callable[..., bytes | None]] = {
    "losses": draw_losses,
    "schedule": draw_schedule,
    "precision": draw_precision,
    "merges": draw_merges,
}
