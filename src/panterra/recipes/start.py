"""Weights that a pretraining starts from instead of random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from panterra.errors import InputError
from panterra.files import file_checksum, read_json
from panterra.models.anysat import AnySat, AnySatConfig
from panterra.models.anysat_convert import ANYSAT_LICENCE
from panterra.models.anysat_predictor import AnySatPredictorConfig
from panterra.models.anysat_training import load_anysat_training
from panterra.models.olmoearth import OlmoEarth, OlmoEarthConfig
from panterra.models.weights import load_model, weights_checksum
from panterra.objectives.jepa import JEPA
from panterra.recipes.anysat import AnySatRecipe
from panterra.recipes.olmoearth import OlmoEarthRecipe
from panterra.train import checkpoint
from panterra.train.loop import UNKNOWN, Run

R = TypeVar("R", bound=AnySatRecipe | OlmoEarthRecipe)
_Config = AnySatConfig | AnySatPredictorConfig | OlmoEarthConfig

_OWN = ("sensors", "modalities", "observed", "band_sets", "drop_path")
"""What a recipe may have otherwise than the weights it starts from, as far as both have the same modalities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run starts."""

    about: Mapping[str, Any]
    """What the run notes: source, checksum, licence and which parts are not fresh; plain JSON."""
    state: Mapping[str, Tensor]
    """Entries of the objective's state dict; empty for a run that goes on, which has its own."""


def open_start(recipe: AnySatRecipe | OlmoEarthRecipe, given: str | None, out: Path) -> Start | None:
    """Read the weights that a run in `out` starts from; of one that goes on, what it noted when it started.

    They are a published training checkpoint of AnySat (a file: student, predictor and teacher), or any model that
    `load_model` opens (the encoder alone). Raises InputError for weights that do not fit the recipe.
    """
    if checkpoint.newest(out / "checkpoints") is not None:
        noted = noted_start(out)
        return None if noted is None else Start(about=noted, state={})
    return None if given is None else read_start(recipe, given)


def noted_start(out: Path) -> dict[str, Any] | None:
    """Read what a run noted of its start; None where it started from random weights, or never."""
    path = out / "run.json"
    if not path.is_file():
        return None
    found: dict[str, Any] | None = read_json(path, UNKNOWN)["run"]["settings"].get("start")
    return found


def read_start(recipe: AnySatRecipe | OlmoEarthRecipe, given: str) -> Start:
    """Read the weights that a recipe starts from, see `open_start`."""
    if isinstance(recipe, OlmoEarthRecipe):
        return _olmoearth_start(recipe, given)
    return _training_start(recipe, Path(given)) if Path(given).is_file() else _anysat_start(recipe, given)


def begin_from(run: Run, start: Start) -> Run:
    """Let a run start from weights, and note it among its settings."""

    def objective() -> nn.Module:
        built = run.objective()
        built.load_state_dict(start.state, strict=False)  # `read_start` has compared them
        return built

    settings = {**run.settings, "start": dict(start.about)}
    return replace(run, objective=objective if start.state else run.objective, settings=settings)


def inherit(recipe: R, start: Mapping[str, Any] | None) -> R:
    """Give a recipe the licence of the weights that its run started from, unless it states one."""
    if start is None or recipe.licence is not None or start["licence"] is None:
        return recipe
    return replace(recipe, licence=start["licence"])


def _training_start(recipe: AnySatRecipe, path: Path) -> Start:
    layout, heads = recipe.encoder.layout, recipe.predictor_heads
    training = load_anysat_training(path, layout=layout, predictor_heads=heads)
    _compare(path, "encoder", training.encoder, recipe, recipe.encoder)
    _compare(path, "predictor", training.predictor, recipe, recipe.objective.predictor)
    about = {
        "source": str(path),
        "sha256": file_checksum(path),
        "licence": ANYSAT_LICENCE,
        "parts": ["student", "predictor", "teacher"],
    }
    state = {key: value for key, value in training.state.items() if not _foreign_sensor(key, recipe)}
    with torch.device("meta"):
        wanted = JEPA(recipe.objective).state_dict()
    return Start(about=about, state=_fitting(str(path), recipe, wanted, state))


def _anysat_start(recipe: AnySatRecipe, given: str) -> Start:
    """Start student and teacher from one encoder; the predictor is fresh."""
    model = load_model(given)
    if not isinstance(model, AnySat):
        raise InputError(f"{given} is no AnySat, which {recipe.name} trains; start from one, or choose another recipe")
    _compare(given, "encoder", model.config, recipe, recipe.encoder)
    entries = {k: v for k, v in model.state_dict().items() if not _foreign_sensor(f"encoder.{k}", recipe)}
    with torch.device("meta"):
        wanted = AnySat(recipe.encoder).state_dict()
    entries = _fitting(given, recipe, wanted, entries)
    about = _about(given, model, ["student", "teacher"])
    state = {f"{part}.{key}": value for part in ("encoder", "teacher") for key, value in entries.items()}
    return Start(about=about, state=state)


def _olmoearth_start(recipe: OlmoEarthRecipe, given: str) -> Start:
    """Start the student from an encoder, and a teacher that follows it; others stay random, as the predictor starts."""
    model = load_model(given)
    if not isinstance(model, OlmoEarth):
        raise InputError(
            f"{given} is no OlmoEarth, which {recipe.name} trains; start from one, or choose another recipe"
        )
    _compare(given, "encoder", model.config, recipe, recipe.encoder)
    for m in recipe.encoder.modalities:
        if m in model.config.modalities and model.config.groups(m) != recipe.encoder.groups(m):
            raise InputError(f"{given} does not fit {recipe.name}: it groups the bands of {m} otherwise")
    with torch.device("meta"):
        wanted = OlmoEarth(recipe.encoder).state_dict()
    ours, theirs = recipe.encoder.modalities, model.config.modalities
    # The student never looks at maps that are predicted alone: what embeds them may be fresh.
    fresh = [m for m in ours if m not in theirs and m not in recipe.encoder.observed]
    wanted = _without(wanted, fresh)
    entries = _fitting(given, recipe, wanted, _without(model.state_dict(), [m for m in theirs if m not in ours]))
    parts = {"encoder": "student", "teacher": "teacher"} if recipe.teacher.follows else {"encoder": "student"}
    taught = ("patch_embeddings.", "output.")  # all that a teacher has
    state = {
        f"{part}.{key}": value
        for part in parts
        for key, value in entries.items()
        if part == "encoder" or key.startswith(taught)
    }
    return Start(about=_about(given, model, list(parts.values())), state=state)


def _without(state: Mapping[str, Tensor], modalities: Sequence[str]) -> dict[str, Tensor]:
    """Leave out the entries of an OlmoEarth that are of some modalities alone."""
    homes = tuple(f"{home}.{m}." for m in modalities for home in ("patch_embeddings", "encodings.channel"))
    return {key: value for key, value in state.items() if not f"{key}.".startswith(homes)}


def _about(given: str, model: AnySat | OlmoEarth, parts: list[str]) -> dict[str, Any]:
    return {"source": given, "sha256": weights_checksum(model), "licence": model.licence, "parts": parts}


def _foreign_sensor(key: str, recipe: AnySatRecipe) -> bool:
    """Tell whether an entry is of a sensor that the recipe does without."""
    _, kind, *rest = key.split(".")[:3] if "." in key else (key, "")
    return kind == "projectors" and rest[0] not in {sensor.name for sensor in recipe.encoder.sensors}


def _compare(
    source: object, part: str, found: _Config, recipe: AnySatRecipe | OlmoEarthRecipe, wanted: _Config
) -> None:
    """Refuse another architecture, by the first setting that differs."""
    for name in (f.name for f in fields(wanted) if f.name not in _OWN):
        if getattr(found, name) != getattr(wanted, name):
            raise InputError(
                f"{source} does not fit {recipe.name}: {name} of its {part} is {getattr(found, name)!r} and the "
                f"recipe's is {getattr(wanted, name)!r}; choose a recipe of its architecture (--set changes settings)"
            )


def _fitting(
    source: str,
    recipe: AnySatRecipe | OlmoEarthRecipe,
    wanted: Mapping[str, Tensor],
    state: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Refuse entries other than the wanted ones, by the first that differs; give them back."""
    for name in (*wanted, *state):
        found, needed = (_shape(entries.get(name)) for entries in (state, wanted))
        if found != needed:
            raise InputError(
                f"{source} does not fit {recipe.name}: its {name} is {found} and the recipe's is {needed}; choose a "
                "recipe of its architecture (--set changes settings)"
            )
    return state


def _shape(value: Tensor | None) -> str:
    return "absent" if value is None else str(list(value.shape))
