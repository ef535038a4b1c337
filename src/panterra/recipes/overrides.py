"""Settings that a person changes: `key=value`, checked before anything runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.normalize import olmoearth_range
from panterra.models.olmoearth import check_width
from panterra.models.packed import Packed
from panterra.objectives.jepa_batches import Source
from panterra.objectives.losses import LOSSES, REGULARISERS, Pair, regularise, token_loss
from panterra.objectives.masking import STRATEGIES, make_masks
from panterra.recipes.anysat import AnySatRecipe
from panterra.recipes.nano import DATES, SIDE_PX, NanoRecipe
from panterra.recipes.olmoearth import OlmoEarthRecipe

_Settings = TypeVar("_Settings")

CHOICES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "masking": STRATEGIES,
    "loss": LOSSES,
    "regulariser": REGULARISERS,
}
"""Settings that name a function by their key "type"; the other keys are that function's options."""
_NOT_OPTIONS = ("generator", "across_ranks", "base", "views")
_TUPLES = {Collection[str]: tuple[str, ...], Collection[str] | None: tuple[str, ...] | None}


def override(recipe: _Settings, changes: Sequence[str]) -> _Settings:
    """Apply changes such as `lr=1e-4`, `loss.tau=0.2`, `patch_px=1,2,4` or `steps=null`, in their order.

    Values are JSON, or plain text; a tuple is a JSON list or its members between commas. Raises InputError.
    """
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"{change!r} sets nothing; write it as key=value, such as lr=1e-4 or loss.tau=0.2")
        recipe = _replaced(recipe, key.strip().split("."), value.strip(), key.strip())
    return recipe


def check(recipe: OlmoEarthRecipe | AnySatRecipe | NanoRecipe) -> None:
    """Refuse settings that a run would stumble over later. Raises InputError."""
    if isinstance(recipe, NanoRecipe):
        _check_nano(recipe)
        return
    if isinstance(recipe, AnySatRecipe):
        _check_anysat(recipe)
        return
    for m in recipe.modalities:
        if m not in MODALITIES:
            raise InputError(f"no modality {m!r}; known: {', '.join(sorted(MODALITIES))}")
        if m == "naip":
            raise InputError("naip has a grid of its own; train on naip_10")
        olmoearth_range(m)
    for part in (recipe.encoder, recipe.objective.predictor):
        check_width(part)
    counts = {"batch": recipe.batch, "micro_batch": recipe.micro_batch, "views": recipe.views}
    for key, count in counts.items():
        if count < 1:
            raise InputError(f"{key} is {count}; wanted 1 at least")
    if recipe.contrast_weight and recipe.views != 2:
        raise InputError(f"{recipe.views} views with a contrast of two; set views=2, or contrast_weight=0")
    for key in ("patch_px", "side_patches"):
        if not getattr(recipe, key) or min(getattr(recipe, key)) < 1:
            raise InputError(f"{key} is {list(getattr(recipe, key))}; wanted whole numbers from 1 on")
    for key, known in CHOICES.items():
        if getattr(recipe, key) is not None:
            _check_options(key, getattr(recipe, key), known)
    _try(recipe)


def _check_anysat(recipe: AnySatRecipe) -> None:
    for name, dim, heads in (
        ("encoder", recipe.encoder.dim, recipe.encoder.heads),
        ("predictor", recipe.encoder.dim, recipe.predictor_heads),
    ):
        if dim % 32 or dim % heads:
            raise InputError(
                f"a width of {dim} with {heads} heads in the {name}; take a multiple of 32 and of the heads"
            )
    for key in ("modality_dropout", "date_dropout"):
        if not 0 <= getattr(recipe, key) < 1:
            raise InputError(f"{key} is {getattr(recipe, key)}; it is a share of what is there, from 0 to below 1")
    for key in ("epochs", "steps", "micro_batch", "patience", "predictor_depth"):
        value = getattr(recipe, key)
        if value is not None and value < 1:
            raise InputError(f"{key} is {value}; wanted 1 at least")


def _check_nano(recipe: NanoRecipe) -> None:
    if recipe.encoder.dim % (4 * recipe.encoder.heads):
        raise InputError(
            f"a width of {recipe.encoder.dim} with {recipe.encoder.heads} heads; take a multiple of 4 each"
        )
    for key in ("places", "patch_px", "side_patches", "dates"):
        if not getattr(recipe, key) or min(getattr(recipe, key)) < 1:
            raise InputError(f"{key} is {list(getattr(recipe, key))}; wanted whole numbers from 1 on")
    if max(recipe.dates) > DATES:
        raise InputError(f"{max(recipe.dates)} dates came; a place has {DATES}")
    if max(recipe.patch_px) * min(recipe.side_patches) > SIDE_PX:
        raise InputError(
            f"{min(recipe.side_patches)} patches of {max(recipe.patch_px)} pixels do not fit into places of {SIDE_PX}"
        )
    for key in ("tokens", "batch", "steps", "average_window"):
        if getattr(recipe, key) < 1:
            raise InputError(f"{key} is {getattr(recipe, key)}; wanted 1 at least")
    if not recipe.warmup_steps <= round(recipe.restart * recipe.steps) < recipe.steps:
        raise InputError(
            f"restart={recipe.restart:.4g} of {recipe.steps} steps came; give a share below 1 that leaves room for"
            f" {recipe.warmup_steps} warmup_steps"
        )


def _replaced(settings: _Settings, path: Sequence[str], value: str, key: str) -> _Settings:
    known = [f.name for f in fields(settings)]  # type: ignore[arg-type]
    name, *rest = path
    if name not in known:
        raise _unknown(key, name, known)
    held = getattr(settings, name)
    if not rest:
        if is_dataclass(held):
            parts = ", ".join(f"{key}.{f.name}" for f in fields(held))
            raise InputError(f"{key} is set by its parts: {parts}")
        hint = get_type_hints(type(settings))[name]
        return replace(settings, **{name: _parse(value, hint, key)})  # type: ignore[type-var]
    if isinstance(held, tuple) and held and isinstance(held[0], Source):
        return replace(settings, **{name: _source_replaced(held, rest, value, key)})  # type: ignore[type-var]
    if is_dataclass(held):
        return replace(settings, **{name: _replaced(held, rest, value, key)})  # type: ignore[type-var]
    if not isinstance(held, Mapping) or len(rest) > 1:
        raise InputError(f"{key} has nothing to set inside {name}; write {name}=value")
    return replace(settings, **{name: {**held, rest[0]: _option(name, held, rest[0], value, key)}})  # type: ignore[type-var]


def _source_replaced(sources: Sequence[Source], path: Sequence[str], value: str, key: str) -> tuple[Source, ...]:
    names = [source.name for source in sources]
    if path[0] not in names or len(path) < 2:
        parts = ", ".join(f.name for f in fields(Source) if f.name != "name")
        raise InputError(f"{key} sets nothing; write sources.NAME.PART=value with {', '.join(names)} and {parts}")
    return tuple(_replaced(s, path[1:], value, key) if s.name == path[0] else s for s in sources)


def _option(setting: str, held: Mapping[str, Any], name: str, value: str, key: str) -> Any:
    """Parse one value of a mapping; that of a function's option by its type."""
    if setting not in CHOICES:
        return _plain(value)
    known = CHOICES[setting]
    if name == "type":
        if value not in known:
            raise _unknown(key, value, known)
        return value
    options = _options(known[held["type"]])
    if name not in options:
        raise _unknown(key, name, options)
    return _parse(value, options[name], key)


def _unknown(key: str, name: str, known: Iterable[str]) -> InputError:
    near = get_close_matches(name, known, n=3) or sorted(known)
    return InputError(f"no {name!r} to set ({key}); near it: {', '.join(near)}")


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """List the options of a strategy or loss, those that it passes on included, with their types."""
    bound = function if isinstance(function, partial) else partial(function)
    hints = get_type_hints(bound.func)
    named = inspect.signature(bound.func).parameters.values()
    options = {p.name: hints[p.name] for p in named if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_OPTIONS}
    if any(p.kind is p.VAR_KEYWORD for p in named):
        given = {p.name: p.default for p in named} | bound.keywords
        passed = [f for f in (*bound.args, *given.values()) if callable(f) and f is not inspect.Parameter.empty]
        for other in passed:
            options |= _options(other)
    if "temperature" in options:
        options["tau"] = options.pop("temperature")
    return {name: hint for name, hint in options.items() if name not in bound.keywords}


def _check_options(key: str, config: Mapping[str, Any], known: Mapping[str, Callable[..., Any]]) -> None:
    name = str(config.get("type"))
    if name not in known:
        raise _unknown(f"{key}.type", name, known)
    options = _options(known[name])
    strange = [option for option in config if option != "type" and option not in options]
    if strange:
        raise InputError(
            f"{key} {name!r} has no option {strange[0]!r} (it has {', '.join(options)}); set it as a whole: "
            f'{key}={{"type": "{name}"}}'
        )


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _parse(value: str, hint: Any, key: str) -> Any:
    """Read a value as the type of its setting."""
    parsed, hint = _plain(value), _TUPLES.get(hint, hint)
    listed = any(get_origin(kind) is tuple for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
    if listed and not isinstance(parsed, list | NoneType):
        parsed = [_plain(part.strip()) for part in value.split(",")]
    try:
        return TypeAdapter(hint).validate_python(parsed)
    except ValidationError as error:
        raise InputError(f"{key} cannot be {value!r}: {error.errors()[0]['msg'].lower()}") from None


def _try(recipe: OlmoEarthRecipe) -> None:
    """Mask one patch and compare two tokens, so that what cannot work fails here."""
    missing = {m: torch.zeros(1, 1, 1, 1, len(recipe.encoder.groups(m)), dtype=torch.bool) for m in recipe.modalities}
    token = torch.ones(1, 2, 2)
    pair = Pair(predicted=token, target=token, valid=torch.ones(1, 2, dtype=torch.bool))
    try:
        make_masks(missing, recipe.masking, generator=torch.Generator().manual_seed(0))
        token_loss({recipe.modalities[0]: pair}, recipe.loss)
        if recipe.regulariser is not None:
            seen = Packed.of(torch.ones(2, 1, dtype=torch.bool))
            regularise(token[0], seen, recipe.regulariser, across_ranks=recipe.across_ranks)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"masking or loss cannot be used so: {error}") from None
