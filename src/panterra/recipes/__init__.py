"""Recipes: complete, reproducible runs by name."""

from collections.abc import Callable
from difflib import get_close_matches

from panterra.errors import InputError
from panterra.recipes.olmoearth import ABLATED, ABLATIONS, RUNS, OlmoEarthRecipe

__all__ = ["ABLATED", "ABLATIONS", "RECIPES", "OlmoEarthRecipe", "recipe"]

RECIPES: dict[str, Callable[[], OlmoEarthRecipe]] = {**RUNS, **ABLATED}


def recipe(name: str) -> OlmoEarthRecipe:
    """Give a recipe by name."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=3) or RUNS
        raise InputError(f"no recipe {name!r}; near it: {', '.join(near)} (panterra pretrain --list shows all)")
    return RECIPES[name]()
