"""Reads the config text that mmengine puts into checkpoints, which is Python. Nothing in it is run."""

import ast
from typing import Any

# Longer texts are not read. Published ones have some ten thousand characters.
LONGEST = 2**20


def model_settings(text: Any) -> dict[str, Any]:
    """The section `model` of a config's text: dictionaries, lists, numbers, text and None, of any depth.

    Values of other kinds are left out. A text that is no config has no settings: {}.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        return {}
    try:
        lines = ast.parse(text).body
        for line in lines:
            if isinstance(line, ast.Assign) and [ast.unparse(target) for target in line.targets] == ["model"]:
                value = _value(line.value)
                return value if isinstance(value, dict) else {}
    # What comes out of a stranger's text can be too deep for the parser, or no Python.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return {}


class _Unknown(ValueError):
    """An expression that is not a plain value."""


def _value(node: ast.expr) -> Any:
    """What an expression of literals and of `dict(...)` means.

    Raises:
      ValueError: it is another expression.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return _known({word.arg: word.value for word in node.keywords if word.arg})
    if isinstance(node, ast.Dict):
        return _known({ast.literal_eval(key): value for key, value in zip(node.keys, node.values) if key is not None})
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Constant | ast.UnaryOp):
        return ast.literal_eval(node)
    raise _Unknown(ast.dump(node)[:100])


def _known(nodes: dict[Any, ast.expr]) -> dict[Any, Any]:
    """The values of those expressions that are plain."""
    values = {}
    for key, node in nodes.items():
        try:
            values[key] = _value(node)
        except _Unknown:
            continue
    return values
