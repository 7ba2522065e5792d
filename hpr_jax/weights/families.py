"""Detectors of other projects: brings the names of their tensors to the official ones.

A family has a table of names like that of `official_names.py`, and as strict: every tensor of a file has its place, or the
file is refused. What follows, recognising the detector and loading it, is the same for all.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from hpr_jax.errors import UserError

Tensors = Mapping[str, np.ndarray]
# A pattern of full names, and the official name in their place. Of several tensors that are one tensor there, joined at
# their first axis, the official names end in @0, @1 and so on.
Rule = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Family:
    """The detectors of another project.

    Attributes:
      project: its name, for messages.
      mark: a tensor that all of its detectors have, and those of no other family.
      rules: makes the table of names; it gets the tensors of the file.
      aliases: prefixes under which a file may hold some tensors a second time, and the prefixes of the first.
      published: what of its detectors stands in no tensor, as settings in the words of mmdetection's configs; it gets the
        meta data of the file.
      adapt: changes the tensors, by their official names, and the meta data.
    """

    project: str
    mark: str
    rules: Callable[[Tensors], Iterable[Rule]]
    aliases: Mapping[str, str]
    published: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    adapt: Callable[[dict[str, np.ndarray], Mapping[str, Any]], tuple[dict[str, np.ndarray], Mapping[str, Any]]]


def as_official(
    family: Family, tensors: Tensors, meta: Mapping[str, Any], source: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a family's file by official name, and its meta data with what `recognize` needs beside them.

    Args:
      source: the name of the file, for messages.

    Raises:
      UserError: a tensor has no place in the table, or two names of one tensor have different values.
    """
    table = [(re.compile(pattern), name) for pattern, name in family.rules(tensors)]
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in _without_aliases(tensors, family.aliases, source).items():
        official = next((match.expand(to) for rule, to in table if (match := rule.fullmatch(name))), None)
        if official is None:
            raise UserError(
                f"{source} is of {family.project}, and holds {name}, which no detector of it that is known here has."
            )
        renamed[official] = tensor
    adapted, meta = family.adapt(_joined(renamed, source), meta)
    return adapted, {**meta, "model": family.published(meta)}


def _without_aliases(tensors: Tensors, aliases: Mapping[str, str], source: str) -> dict[str, np.ndarray]:
    """The tensors under the first of their names alone."""
    unique: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        for alias, prefix in aliases.items():
            if name.startswith(alias):
                name = prefix + name.removeprefix(alias)
        if name in unique and not np.array_equal(unique[name], tensor):
            raise UserError(f"{source} holds {name} under two names, with different values.")
        unique[name] = tensor
    return unique


def _joined(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """The tensors with those joined whose names end in @0, @1 and so on."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        whole, _, part = name.partition("@")
        parts.setdefault(whole, {})[int(part or 0)] = tensor
    joined = {}
    for name, by_number in parts.items():
        ordered = [by_number[number] for number in sorted(by_number)]
        if len({tensor.shape[1:] for tensor in ordered}) != 1 or any(not tensor.ndim for tensor in ordered[1:]):
            raise UserError(f"The parts of {name} in {source} have shapes that do not fit.")
        joined[name] = np.concatenate(ordered) if len(ordered) > 1 else ordered[0]
    return joined
