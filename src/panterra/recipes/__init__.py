"""Recipes: complete, reproducible runs by name."""

from collections.abc import Callable
from difflib import get_close_matches

from panterra.errors import InputError
from panterra.recipes import anysat
from panterra.recipes.anysat import AnySatRecipe
from panterra.recipes.nano import NAME, NanoRecipe
from panterra.recipes.olmoearth import ABLATED, ABLATIONS, RUNS, OlmoEarthRecipe

__all__ = ["ABLATED", "ABLATIONS", "RECIPES", "AnySatRecipe", "NanoRecipe", "OlmoEarthRecipe", "Recipe", "recipe"]

Recipe = OlmoEarthRecipe | AnySatRecipe | NanoRecipe

RECIPES: dict[str, Callable[[], Recipe]] = {NAME: NanoRecipe, **RUNS, **ABLATED, **anysat.RUNS}


def recipe(name: str) -> Recipe:
    """Give a recipe by name."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=3) or RUNS
        raise InputError(f"no recipe {name!r}; near it: {', '.join(near)} (panterra pretrain --list shows all)")
    return RECIPES[name]()
