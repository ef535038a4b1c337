"""What an AnySat run is trained on: downloaded data sets, and the statistics that standardise each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from panterra.data.labelled import LabelledSet, open_labelled
from panterra.errors import InputError
from panterra.files import read_json, write_whole
from panterra.models.anysat_sensors import Sensor, sensor_of
from panterra.models.anysat_statistics import Statistics, as_json, fit_statistics, statistics_from_json
from panterra.recipes.anysat import AnySatRecipe
from panterra.sample import Batch

STATISTICS = "statistics.json"
LOOKED_AT = 512
"""Samples of a data set that its statistics are fitted to, evenly spread."""


def parse_folders(recipe: AnySatRecipe, given: Sequence[str]) -> dict[str, Path]:
    """Read `name=folder` for each data set of a recipe; the name may be left out where there is one. Raises InputError.

    The folders come in the recipe's order.
    """
    names = [source.name for source in recipe.sources]
    folders = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals and len(names) == 1:
            name, path = names[0], item
        if name not in names:
            raise InputError(f"{item!r} came as data; {recipe.name} takes {' '.join(f'{n}=FOLDER' for n in names)}")
        folders[name] = Path(path)
    lost = [name for name in names if name not in folders]
    if lost:
        raise InputError(f"{recipe.name} needs {', '.join(lost)}; give --data {' '.join(f'{n}=FOLDER' for n in names)}")
    return {name: folders[name] for name in names}


def open_sets(folders: Mapping[str, Path], split: str) -> dict[str, LabelledSet]:
    """Open a split of each data set as published.

    Alone PASTIS-HD trains on all of its folds. Aerial images come whole where a run cuts them at random: all of
    TreeSatAI, and what FLAIR trains on.
    """
    options: dict[str, dict[str, Any]] = {"treesatai_ts": {"crop": False}}
    if split == "train":
        options["flair"] = {"crop": False}
    if split == "train" and len(folders) == 1:
        options["pastis_hd"] = {"folds": (1, 2, 3, 4, 5)}
    return {name: open_labelled(name, folder, split, **options.get(name, {})) for name, folder in folders.items()}


def kept_statistics(
    recipe: AnySatRecipe, samples: Mapping[str, LabelledSet], out: Path, *, looked_at: int = LOOKED_AT
) -> dict[str, dict[str, Statistics]]:
    """Read the statistics that a run in `out` was started with; where it is new, fit and keep them.

    Published recipes average what samples have by themselves, others take all pixels together.
    """
    path = out / STATISTICS
    if path.exists():
        held = read_json(path, "remove it where the run has no checkpoint yet, put back a copy where it has")
        return {name: {sensor: statistics_from_json(s) for sensor, s in found.items()} for name, found in held.items()}
    sensors = {sensor.name: sensor for sensor in recipe.encoder.sensors}
    fitted = {
        name: fit_statistics(batches_of(chosen, sensors, looked_at=looked_at), sensors, by_sample=recipe.published)
        for name, chosen in samples.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    told = {n: {k: as_json(s) for k, s in found.items()} for n, found in fitted.items()}
    write_whole(path, json.dumps(told, indent=1), sync=True)
    return fitted


def batches_of(samples: LabelledSet, sensors: Mapping[str, Sensor], *, looked_at: int) -> Iterator[Batch]:
    """Read some samples, evenly spread, with what the sensors take of them."""
    for index in np.unique(np.linspace(0, len(samples) - 1, min(looked_at, len(samples))).astype(int)):
        batch = samples[int(index)].batch
        seen = {m: o for m, o in batch.observations.items() if sensor_of(m, sensors) is not None}
        if seen:
            yield replace(batch, observations=seen)
