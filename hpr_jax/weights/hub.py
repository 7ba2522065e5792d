"""Detectors in repositories of the Hugging Face hub, named like `hf://owner/name`. Imports no JAX.

Nothing here opens a network connection unless such a name is given. The library `huggingface_hub` is the extra `hub`.
"""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpr_jax.errors import UserError

# What names of repositories begin with.
HUB = "hf://"
# The files of a published detector: weights, description and model card.
WEIGHTS, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_hub(place: str | Path) -> bool:
    """Whether a place is the name of a repository, and no path."""
    return isinstance(place, str) and place.startswith(HUB)


def local_path(place: str | Path) -> Path:
    """The path of a place: that of a copy on this machine if it is the name of a repository.

    Raises:
      UserError: the repository cannot be copied.
    """
    return pull(str(place)) if is_hub(place) else Path(place).expanduser()


def pull(place: str) -> Path:
    """Copies the files of a repository to this machine, or finds them where they were copied before; returns their folder.

    Raises:
      UserError: `huggingface_hub` is not installed, there is no such repository, or it cannot be reached.
    """
    name, hub = _repository(place), _library(place)
    with _explained(place, "read"):
        folder = Path(hub.snapshot_download(name, allow_patterns=list(FILES)))
    if not any((folder / file).is_file() for file in FILES):
        raise UserError(f"{place} has none of the files {', '.join(FILES)}; it is no detector.")
    return folder


def push(folder: Path, place: str) -> None:
    """Copies the files of a folder into a repository, which is made if there is none, and must not have them yet.

    Raises:
      UserError: as `check_place` does, or the repository has one of the files, or it cannot be written.
    """
    name, hub = _repository(place), _library(place)
    with _explained(place, "written"):
        hub.create_repo(name, exist_ok=True)
        there = set(hub.list_repo_files(name))
    taken = [file for file in FILES if file in there]
    if taken:
        raise UserError(f"{place} has a {taken[0]} already; choose another name, or delete the file there.")
    with _explained(place, "written"):
        hub.upload_folder(
            repo_id=name, folder_path=str(folder), allow_patterns=list(FILES), commit_message="Add a detector for hpr_jax"
        )


def check_place(place: str) -> None:
    """Checks what can be checked without the network.

    Raises:
      UserError: `huggingface_hub` is not installed, or this is no name of a repository.
    """
    _repository(place)
    _library(place)


def _repository(place: str) -> str:
    """The name of a repository without its beginning.

    Raises:
      UserError: it is no name.
    """
    name = place.removeprefix(HUB)
    if not _NAME.fullmatch(name):
        raise UserError(f"{place!r} names no repository of the Hugging Face hub; such names are like {HUB}owner/name.")
    return name


def _library(place: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(f'{place} needs the package huggingface_hub; install it with pip install "hpr_jax[hub]".') from error


@contextmanager
def _explained(place: str, what: str) -> Iterator[None]:
    """A context that turns whatever the library raises into one sentence; `what` says what cannot be done."""
    try:
        yield
    except Exception as error:
        # The library raises errors of its own, of the web client beneath it, and of the system.
        raise UserError(f"{place} cannot be {what}: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    # By name, as the library has moved its errors from module to module.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kinds:
        return "its owner gives access to those who ask; ask for it on its page, and log in with `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such repository, or it is private; check the name, or log in with `hf auth login`"
    if status in (401, 403) or "LocalTokenNotFoundError" in kinds:
        return "the hub does not let you; log in with `hf auth login` as one who may write there"
    if "OfflineModeIsEnabled" in kinds:
        return "the library is set not to use the network; unset HF_HUB_OFFLINE"
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "TransportError", "TimeoutError"}:
        return "the hub cannot be reached; check the network"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(character if character.isprintable() else " " for character in lines[0])[:200].rstrip(" .")
