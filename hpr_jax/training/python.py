"""Training from Python: `hpr_jax.train`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hpr_jax.config import as_overrides, config_name, load_config, override
from hpr_jax.runtime.compilation_cache import enable_compilation_cache
from hpr_jax.training.callbacks import Callback
from hpr_jax.training.fine_tuning import fine_tuning_config
from hpr_jax.training.metric_reader import Metrics, read_metrics
from hpr_jax.training.run import train as run


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
      workdir: of the run; `hpr_jax.load` takes it.
      metrics: the numbers of the last evaluation, by name.
    """

    workdir: Path
    metrics: dict[str, float]

    @property
    def history(self) -> Metrics:
        """The numbers that the run has logged: `history.series("loss")` gives steps and values, `history.names("merge/")`
        the names with a prefix."""
        return read_metrics(self.workdir / "metrics.jsonl")


def train(
    config: str | ConfigDict = "finetune.py",
    *,
    data: str | Path | None = None,
    workdir: str | Path | None = None,
    finetune: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
    callbacks: Sequence[Callback] = (),
    accept_changes: bool = False,
) -> TrainingResult:
    """Trains a detector, or goes on with a run that was stopped.

    Args:
      config: a config, or the name of one, like `ddq.py:small`.
      data: the folder of the data, in place of the config's.
      workdir: folder of the run; by default below `runs/`, under the name of the config.
      finetune: the detector to begin with, whatever `hpr_jax.load` takes; the config is then the recipe.
      overrides: settings by dotted key, e.g. `{"train.steps": 500}`.
      callbacks: what hears of steps, evaluations and checkpoints, and may end the run.
      accept_changes: goes on even if settings or data are others than those that the run began with.

    Raises:
      UserError: the run cannot be trained with these settings or data, or another run is at work in the workdir.
      RunError, StoppedError: as the command raises them.
    """
    enable_compilation_cache()
    made = load_config(config) if isinstance(config, str) else config.copy_and_resolve_references()
    settings = as_overrides(overrides)
    if data is not None:
        settings.append(("data.directory", str(data)))
    if finetune is not None:
        made = fine_tuning_config(made, finetune, settings)
    else:
        for key, text in settings:
            override(made, key, text)
    if workdir is None:
        workdir = Path("runs", config_name(config) if isinstance(config, str) else "run")
    folder = Path(workdir).expanduser()
    return TrainingResult(folder, run(made, folder, accept_changes=accept_changes, callbacks=callbacks))
