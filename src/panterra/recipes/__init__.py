"""Recipes: complete, reproducible runs by name."""

from collections.abc import Callable
from difflib import get_close_matches

from panterra.errors import InputError
from panterra.recipes import anysat
from panterra.recipes.anysat import AnySatRecipe
from panterra.recipes.olmoearth import ABLATED, ABLATIONS, RUNS, OlmoEarthRecipe

__all__ = ["ABLATED", "ABLATIONS", "RECIPES", "AnySatRecipe", "OlmoEarthRecipe", "recipe"]

RECIPES: dict[str, Callable[[], OlmoEarthRecipe] | Callable[[], AnySatRecipe]] = {**RUNS, **ABLATED, **anysat.RUNS}


def recipe(name: str) -> OlmoEarthRecipe | AnySatRecipe:
    """Give a recipe by name."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=3) or RUNS
        raise InputError(f"no recipe {name!r}; near it: {', '.join(near)} (panterra pretrain --list shows all)")
    return RECIPES[name]()
