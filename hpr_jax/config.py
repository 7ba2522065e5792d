"""Loads config files by path or name, and overrides their settings by dotted keys."""

import ast
import difflib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hpr_jax.errors import UserError
from hpr_jax.settings import SETTINGS, Setting, leaves, suggestion

# The folder of the config files that come with the package; in a checkout it is a link to configs/.
PACKAGED = Path(__file__).parent / "configs"


def load_config(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Loads a config: calls `get_config(variant)` of the file that `spec` names.

    Args:
      spec: `path.py` or `path.py:variant`. If there is no such file, `configs/ddq.py`, `ddq.py` and `ddq` name the config
        file of the package.
      overrides: (dotted key, text) as `override` takes them.

    Raises:
      UserError: there is no such file or variant, the file cannot be loaded, its function fails, or an override is wrong.
    """
    path, variant = _find(spec)
    module = load_module(path)
    variants = getattr(module, "VARIANTS", None)
    if variant and variants is not None and variant not in variants:
        raise UserError(f"{path} has no variant {variant!r}; {suggestion(variant, variants)}")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise UserError(f"get_config of {path} ends with {type(error).__name__}: {error} ({where}).") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} returns a {type(config).__name__}, not an ml_collections.ConfigDict.")
    for key, text in overrides:
        override(config, key, text)
    return config


def config_name(spec: str) -> str:
    """A name for runs of a config, from its file and its variant, like `ddq_r50_1x`; raises as `load_config` does."""
    path, variant = _find(spec)
    if not variant:
        parameter = inspect.signature(load_module(path).get_config).parameters.get("variant")
        default = parameter.default if parameter else None
        variant = default if isinstance(default, str) else ""
    return f"{path.stem}_{variant}" if variant else path.stem


def _find(spec: str) -> tuple[Path, str]:
    """The file and the variant that `spec` names; the variant is '' if it names none."""
    name, _, variant = spec.partition(":")
    path = Path(name).expanduser()
    if path.is_file():
        return path, variant
    packaged = PACKAGED / path.with_suffix(".py").name
    if str(path.parent) in (".", "configs") and path.suffix in ("", ".py") and packaged.is_file():
        return packaged, variant
    neighbours = [str(file) for file in path.parent.glob("*.py")] if path.parent != Path() else []
    known = neighbours or [f"configs/{file.name}" for file in sorted(PACKAGED.glob("*.py")) if file.stem != "common"]
    raise UserError(f"There is no config file {name}; {suggestion(name, known, lambda name: Path(name).stem)}")


def load_module(path: Path) -> Any:
    """The module of a config file.

    Raises:
      UserError: the file is no Python file, cannot be loaded, or has no function `get_config`.
    """
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"The config file {path} is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(module_spec)
    # Config files import their neighbours by name.
    folder = path.parent.resolve()
    sys.path.insert(0, str(folder))
    modules = set(sys.modules)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"The config file {path} cannot be loaded: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove(str(folder))
        # Neighbours are forgotten: config files of another folder may import others of the same names.
        for neighbour in [key for key in set(sys.modules) - modules if "." not in key]:
            file = getattr(sys.modules[neighbour], "__file__", None)
            if file and Path(file).resolve().parent == folder:
                del sys.modules[neighbour]
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"The config file {path} defines no function get_config.")
    return module


def as_overrides(settings: Mapping[str, object] | None) -> list[tuple[str, str]]:
    """Settings from Python, values by dotted key, as the pairs of key and text that the command line gives."""
    return [(key, value if isinstance(value, str) else repr(value)) for key, value in (settings or {}).items()]


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets the value at a dotted key from a text. The value keeps its type.

    Raises:
      UserError: there is no such key, it is a section, or the text is no value of the type.
    """
    *sections, last = key.split(".")
    node = config
    for part in [*sections, last]:
        if not isinstance(node, ConfigDict) or part not in node:
            dotted = [key for key, _ in leaves(config)]
            raise UserError(f"There is no setting config.{key}; {_key_suggestion(key, dotted)}")
        parent, node = node, node[part]
    if isinstance(node, ConfigDict):
        raise UserError(f"config.{key} is a section; set one of {', '.join(f'config.{key}.{k}' for k in node)}.")
    # What the table says counts, and not the type of a value, which may be a whole number where any number may be.
    with parent.ignore_type():
        parent[last] = _parse(key, text, node)


def _key_suggestion(key: str, known: list[str]) -> str:
    """The known key that is nearest to an unknown one, else the known keys of its section, else all."""
    # Last parts are compared first, since keys of one section are alike already by its name.
    last_parts = {one.rpartition(".")[2] for one in known}
    near_parts = difflib.get_close_matches(key.rpartition(".")[2], last_parts, cutoff=0.6)
    near = difflib.get_close_matches(key, [one for one in known if one.rpartition(".")[2] in near_parts], n=1, cutoff=0)
    if near:
        return f"did you mean config.{near[0]}?"
    section = key.split(".")[0]
    return f"known are {', '.join(k for k in known if k.startswith(section + '.')) or ', '.join(known)}."


def _parse(key: str, text: str, old: Any) -> Any:
    """The value that a text means for a setting that has the value `old`; raises as `override` does."""
    setting = SETTINGS.get(key) or _like(old)
    if setting is not None and setting.kind is str and not setting.many:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if setting is None:
        return value
    if setting.word and value == setting.word:
        return value
    if setting.many:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        items = value if isinstance(value, tuple | list) else (value,)
        if all(map(setting.is_of_type, items)):
            return type(old)(items)
    elif setting.is_of_type(value):
        try:
            return setting.kind(value)
        except OverflowError:
            # A whole number that no float can hold; `hpr_jax.settings.check` refuses infinity.
            return math.inf if value > 0 else -math.inf
    raise UserError(f"config.{key} wants {setting.wanted()}, like {old!r}, and got {text!r}.")


def _like(old: Any) -> Setting | None:
    """What a setting that the table does not know may be, by the value that it has; None if that does not tell."""
    if isinstance(old, tuple | list):
        return Setting("", str if any(isinstance(item, str) for item in old) else float, many=True)
    return next((Setting("", kind) for kind in (bool, int, float, str) if isinstance(old, kind)), None)


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """A config as nested dicts of JSON values; tuples become lists."""

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
    """The dotted keys in which two plain configs differ, each with both values: `train.seed (0 and 1)`."""
    found = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} ({left!r} and {right!r})")
    return found
