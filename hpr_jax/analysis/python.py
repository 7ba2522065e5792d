"""What a detector costs and what a run is worth, from Python: `hpr_jax.describe` and `hpr_jax.report`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpr_jax.analysis.costs import ModuleCost, evaluation_buckets, module_costs, total
from hpr_jax.analysis.describe import costs_table
from hpr_jax.analysis.report import report as write_report
from hpr_jax.config import as_overrides
from hpr_jax.data.loading.batch_plan import Shape
from hpr_jax.models.build import abstract_detector
from hpr_jax.runtime.compilation_cache import enable_compilation_cache
from hpr_jax.weights.source import open_source, random_source


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """What a detector costs. Notebooks show it as a table.

    Attributes:
      modules: parameters and floating-point operations of each module; those of the refiner's parts are in the refiner's.
      image: (height, width) of the image that operations are counted for.
    """

    modules: Sequence[ModuleCost]
    image: Shape

    @property
    def total(self) -> ModuleCost:
        """The whole detector: `.trained` and `.frozen` parameters, `.flops`."""
        return total(self.modules)

    def __repr__(self) -> str:
        return costs_table(self.modules)


def describe(source: str | Path, *, classes: int = 80, overrides: Mapping[str, object] | None = None) -> Description:
    """Counts the parameters of a detector, and the operations that it takes to detect objects in one image. Nothing is
    compiled. The command `describe` also tells shapes and memory.

    Args:
      source: the detector, whatever `hpr_jax.load` takes but exported folders; weights are not read.
      classes: of a config's detector.
      overrides: settings by dotted key, e.g. `{"model.refiner.auxiliaries": ()}`.

    Raises:
      UserError: there is no detector, or a setting is wrong.
    """
    settings = as_overrides(overrides)
    if str(source).partition(":")[0].endswith(".py"):
        found = random_source(str(source), settings, [str(number) for number in range(classes)])
    else:
        found = open_source(source, settings)
    config = found.config
    detector = abstract_detector(config.model, len(found.classes.names), config.compute)
    image = list(evaluation_buckets(config))[-1]
    return Description(module_costs(detector, image, config.model.refiner.primary), image)


def report(workdir: str | Path, *, output: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> Path:
    """Writes one page of HTML on a run: curves, AP, errors, doubtful labels, speed.

    Args:
      workdir: of the run, whose best checkpoint is reported on.
      output: the page; None: `report.html` in the workdir.
      overrides: settings by dotted key, e.g. `{"data.directory": "DIR"}`.

    Returns:
      The path of the page.

    Raises:
      UserError: there is no checkpoint or no data, or a setting is wrong.
      OSError: the page cannot be written.
    """
    enable_compilation_cache()
    folder = Path(workdir).expanduser()
    page = folder / "report.html" if output is None else Path(output).expanduser()
    write_report(folder, page, as_overrides(overrides))
    return page
