"""Which recipe of the package a config comes from: checkpoints do not say."""

from collections.abc import Iterator, Mapping
from typing import Any

from hpr_jax.config import PACKAGED, differences, load_config, load_module, to_plain

# Files of configs that are no recipes of their own.
_PARTS = ("common",)


def recipe_names() -> Iterator[str]:
    """The names of all recipes, like `configs/ddq.py:demo`."""
    for path in sorted(PACKAGED.glob("*.py")):
        if path.stem not in _PARTS:
            for variant in getattr(load_module(path), "VARIANTS", ()) or ("",):
                yield f"configs/{path.name}:{variant}".removesuffix(":")


def nearest_recipe(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and plain config of the recipe that differs from a plain config in the fewest settings."""
    recipes = {name: to_plain(load_config(name)) for name in recipe_names()}
    return min(recipes.items(), key=lambda one: len(differences(one[1], config)))
