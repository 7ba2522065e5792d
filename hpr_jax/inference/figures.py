"""Figures with curves and bars, as PNG files. Their look is hotcoco's, for a light or a dark ground.

matplotlib takes half a second to import, which happens when the first figure is drawn. No figure is known to pyplot, and
matplotlib's settings are as before when a figure is done.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["cyanotype", "cyanotype-dark"]
LIGHT: Theme = "cyanotype"
DARK: Theme = "cyanotype-dark"
# Pixels for each inch of a figure.
RESOLUTION = 110
# Longest name that a figure has room for, in characters.
LONGEST_NAME = 22
# Curves with more points than this have a running mean, over so many points that this number of means is left.
POINTS = 60


def draw_figure(
    draw: Callable[["Figure"], object], width: float, height: float, theme: Theme = LIGHT, layout: Any = "constrained"
) -> bytes:
    """A figure as a PNG file.

    Args:
      draw: fills the figure.
      width, height: in inches, which have `RESOLUTION` pixels.
      layout: what arranges the figure's axes, see `matplotlib.figure.Figure`; None where `draw` does.
    """
    import matplotlib
    from hotcoco.plot import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Names of classes may have dollars, which are no formulas.
    with _silence(), style(theme), matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, height), dpi=RESOLUTION, layout=layout)
        draw(figure)
        data = io.BytesIO()
        FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})
    return data.getvalue()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """A context in which matplotlib neither warns of letters that the font lacks, nor logs that the font has not all of the
    weights that hotcoco asks for."""
    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fonts.setLevel(logging.ERROR)
        try:
            yield
        finally:
            fonts.setLevel(level)


def curve(axes: "Axes", steps: Sequence[float], values: Sequence[float], label: str, **style: Any) -> None:
    """Draws values over steps. Of many values, a running mean is in front of them. Values that are not finite are gaps."""
    xs, ys = np.asarray(steps, float), np.asarray(values, float)
    ys = np.where(np.isfinite(ys), ys, np.nan)
    window = len(ys) // POINTS
    style.setdefault("marker", "o" if len(ys) <= POINTS // 2 else None)
    style = {"markersize": 3, "linewidth": 1.5, **style}
    if window < 2 or np.isnan(ys).any():
        axes.plot(xs, ys, label=label, **style)
        return
    (line,) = axes.plot(xs, ys, linewidth=0.8, alpha=0.25, color=style.get("color"))
    means = np.convolve(ys, np.full(window, 1 / window), mode="valid")
    axes.plot(xs[window - 1 :], means, label=label, **{**style, "color": line.get_color()})


def finish_axes(axes: "Axes", title: str, x: str = "step", y: str = "") -> None:
    """Gives axes a title, names and, where they have several labelled curves, a legend."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x, fontsize=9, labelpad=2)
    axes.set_ylabel(y, fontsize=9, labelpad=2)
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        axes.legend(fontsize=8, loc="best")


def short_name(name: str) -> str:
    """A name as figures show it, on one line; long ones are cut."""
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\u2026"
