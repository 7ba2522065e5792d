"""Sends the numbers of a run to Weights & Biases, beside its files. The library `wandb` is the extra `log`."""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpr_jax.errors import UserError
from hpr_jax.runtime.files import write_whole

log = logging.getLogger("hpr_jax")

# The file in a workdir that has the id of its run there.
ID_FILE = "wandb_id.txt"


def require_wandb(project: str) -> None:
    """Checks that numbers can be sent, before anything is written.

    Raises:
      UserError: a project is given, and the library is not installed.
    """
    if project:
        _library()


class WandbSink:
    """A run at Weights & Biases. A run that goes on continues the one there, since its id is kept in the workdir.

    Whatever goes wrong is one warning: the files of a run have all of its numbers.

    Args:
      project: the name of the project; '': nothing is sent.
      workdir: of the run.
      config: as nested dicts of JSON values.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        self._run: Any = None
        if not project:
            return
        library, file = _library(), workdir / ID_FILE
        try:
            known = file.read_text().strip() if file.exists() else ""
            self._run = library.init(
                project=project, id=known or None, resume="allow", dir=str(workdir), name=workdir.name, config=dict(config)
            )
            write_whole(file, f"{self._run.id}\n".encode())
        except Exception as error:
            self._give_up(error)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends the numbers of a step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(numbers), step=step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Ends the run there."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        # The library raises errors of its own, of the network, and of the system.
        self._run = None
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("Weights & Biases gets no more numbers of this run: %s. The files of the run have them.", text)


def _library() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            'config.train.wandb needs the package wandb; install it with pip install "hpr_jax[log]", or leave the setting '
            "empty."
        ) from error
