"""Whether there is a data set at all: a question that is answered before anything large is imported or computed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def missing_data(settings: Mapping[str, Any]) -> str | None:
    """Why there is no data set to train on, as part of a sentence; None if its directory is there.

    Args:
      settings: section `data` of a config.
    """
    directory = Path(settings["directory"]).expanduser()
    if directory.is_dir():
        return None
    what = "is a file" if directory.exists() else "does not exist"
    return f"the data set {directory} (config.data.directory) {what}"
