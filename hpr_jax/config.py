"""Config files: loaded by path, overridden by dotted keys, checked with suggestions."""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hpr_jax.errors import UserError

EVALUATORS = ("auto", "hotcoco", "pycocotools")
AUGMENTATIONS = ("detr", "lsj")
# Lists of names, which can be told from lists of numbers even when they are empty.
NAMES = ("model.refiner.auxiliaries", "model.refiner.merge_points", "compute.remat")


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or the known words if none is near."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."


def load_config(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Loads `path.py` or `path.py:variant`: calls the file's `get_config(variant)`.

    Args:
      overrides: (dotted key, text) as `override` takes them.

    Raises:
      UserError: no such file, no such variant, or a file without `get_config`; what `override` raises.
    """
    config = _load(spec)
    for key, text in overrides:
        override(config, key, text)
    return config


def _load(spec: str) -> ConfigDict:
    name, _, variant = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        known = [str(file) for pattern in ("*.py", "*/*.py") for file in path.parent.glob(pattern)] or Path().glob("*/*.py")
        raise UserError(f"There is no config file {name}; {suggestion(name, known)}")
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    # Config files import their neighbours.
    sys.path.insert(0, str(path.parent.resolve()))
    modules = set(sys.modules)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"The config file {name} cannot be loaded: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.pop(0)
        # Another folder may have neighbours of the same names.
        for neighbour in [key for key in set(sys.modules) - modules if "." not in key]:
            if Path(getattr(sys.modules[neighbour], "__file__", None) or "").parent == path.parent.resolve():
                del sys.modules[neighbour]
    if not hasattr(module, "get_config"):
        raise UserError(f"The config file {name} defines no function get_config.")
    variants = getattr(module, "VARIANTS", None)
    if variant and variants is not None and variant not in variants:
        raise UserError(f"{name} has no variant {variant!r}; {suggestion(variant, variants)}")
    return module.get_config(variant) if variant else module.get_config()


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets the value at a dotted key from its text, in the type that the value has.

    Raises:
      UserError: an unknown key (with the nearest known one), a section instead of a value, or a value of another type.
    """
    *sections, last = key.split(".")
    node = config
    for part in [*sections, last]:
        if not isinstance(node, ConfigDict) or part not in node:
            dotted = list(_leaves(config))
            raise UserError(f"There is no setting config.{key}; {_key_suggestion(key, dotted)}")
        parent, node = node, node[part]
    if isinstance(node, ConfigDict):
        raise UserError(f"config.{key} is a section; set one of {', '.join(f'config.{key}.{k}' for k in node)}.")
    parent[last] = _parse(key, text, node)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _key_suggestion(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean config.{near[0]}?"
    section = key.split(".")[0]
    return f"known are {', '.join(k for k in known if k.startswith(section + '.')) or ', '.join(known)}."


def _parse(key: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(old, tuple):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        items = value if isinstance(value, tuple | list) else (value,)
        wanted = str if key in NAMES else int | float
        if all(isinstance(item, wanted) and not isinstance(item, bool) for item in items):
            return tuple(items)
    elif isinstance(old, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(old, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(old, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    kind = {bool: "True or False", int: "a whole number", float: "a number", tuple: "a list of numbers"}[type(old)]
    kind = "a list of names" if key in NAMES else kind
    raise UserError(f"config.{key} wants {kind}, like {old!r}, and got {text!r}.")


def check(config: ConfigDict) -> None:
    """Looks for values that no run can go on with.

    Raises:
      UserError: names the setting and what it must be.
    """
    at_least_one = ("train.batch_size", "train.log_every", "train.checkpoint_every", "train.evaluate_every")
    at_least_one += (
        "train.accumulation_steps",
        "train.keep_checkpoints",
        "data.buckets",
        "data.threads",
        "evaluate.batch_size",
        "evaluate.side",
    )
    at_least_one += ("evaluate.max_side", "evaluate.detections", "evaluate.buckets", "augmentation.max_side")
    for key in at_least_one:
        section, name = key.split(".")
        if config[section][name] < 1:
            raise UserError(f"config.{key} is {config[section][name]}; it must be at least 1.")
    if config.data.workers < 0:
        raise UserError(f"config.data.workers is {config.data.workers}; it must be at least 0.")
    if min(config.train.steps, config.train.epochs) < 0 or bool(config.train.steps) == bool(config.train.epochs):
        raise UserError(
            f"config.train.steps is {config.train.steps} and config.train.epochs is {config.train.epochs}; one of them "
            "must be at least 1, and the other 0."
        )
    for key in ("sides", "crop_sides", "crop_range"):
        if not config.augmentation[key] or min(config.augmentation[key]) < 1:
            raise UserError(f"config.augmentation.{key} is {config.augmentation[key]}; it must list lengths in pixels.")
    _check_augmentation(config.augmentation)
    if not 0 <= config.train.ema_decay < 1:
        raise UserError(f"config.train.ema_decay is {config.train.ema_decay}; it must be at least 0 and below 1.")
    canvas = config.evaluate.canvas
    if canvas and canvas < config.evaluate.max_side:
        raise UserError(f"config.evaluate.canvas is {canvas}; it must be 0, or at least config.evaluate.max_side.")
    evaluator = config.evaluate.evaluator
    if evaluator not in EVALUATORS:
        raise UserError(f"config.evaluate.evaluator is {evaluator!r}; {suggestion(evaluator, EVALUATORS)}")


def _check_augmentation(settings: ConfigDict) -> None:
    if settings.kind not in AUGMENTATIONS:
        raise UserError(f"config.augmentation.kind is {settings.kind!r}; {suggestion(settings.kind, AUGMENTATIONS)}")
    for key in ("flip", "crop"):
        if not 0 <= settings[key] <= 1:
            raise UserError(f"config.augmentation.{key} is {settings[key]}; it must be a probability, from 0 to 1.")
    side, scales = settings.lsj.side, settings.lsj.scale_range
    if side < 1:
        raise UserError(f"config.augmentation.lsj.side is {side}; it must be at least 1.")
    if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
        raise UserError(
            f"config.augmentation.lsj.scale_range is {scales}; it must be the smallest and the largest scale, above 0."
        )


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """A config as nested dicts of JSON types."""

    def convert(value):
        if isinstance(value, dict):
            return {key: convert(inner) for key, inner in value.items()}
        return [convert(inner) for inner in value] if isinstance(value, tuple | list) else value

    return convert(config.to_dict())


def from_plain(plain: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `to_plain`; lists become tuples."""

    def convert(value):
        if isinstance(value, Mapping):
            return {key: convert(inner) for key, inner in value.items()}
        return tuple(convert(inner) for inner in value) if isinstance(value, list) else value

    return ConfigDict(convert(plain))


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys, with both values, in which two plain configs differ."""
    found = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} ({left!r} and {right!r})")
    return found
