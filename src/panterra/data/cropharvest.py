"""CropHarvest: crops of the world, each sample a year of a single pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panterra.data.labelled import LabelledSample, LabelledSet, card_of, check_split
from panterra.data.stored_pixels import Array, load_json, observe, open_hdf5, parse_day
from panterra.errors import InputError
from panterra.sample import Batch

STEP_DAYS, STEPS, CHANNELS = 30, 12, 18
S2_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
ELEVATION = 15
"""Channels: VV, VH, Sentinel-2, temperature, precipitation, elevation, slope, vegetation index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One of the benchmark's tasks."""

    box: tuple[float, float, float, float]
    """West, south, east, north of the training samples: the country's extent (Natural Earth)."""
    crop: str | None
    """What is told from all else; None for crops of any kind."""
    tests: str
    """The test files (a pattern)."""


REGIONS = {
    "cropharvest_kenya": Region(box=(33.9, -4.692383, 41.883984, 5.492285), crop="maize", tests="Kenya_maize_*.h5"),
    "cropharvest_brazil": Region(
        box=(-74.002051, -33.742188, -34.805469, 5.257959), crop="coffee", tests="Brazil_coffee_*.h5"
    ),
    "cropharvest_togo": Region(box=(-0.090186, 6.089404, 1.77793, 11.115625), crop=None, tests="togo-eval.h5"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a sample is found."""

    file: Path
    row: int | None
    """In a test file; a training file holds one sample."""
    target: int
    first_day: int
    lonlat: tuple[float, float]


def open_cropharvest(root: str | Path, split: str, *, name: str) -> LabelledSet:
    """Open the training or test samples of a task."""
    card, region, root = card_of(name), REGIONS[name], Path(root)
    check_split(card, split)
    labels = [feature["properties"] for feature in load_json(root / "labels.geojson")["features"]]
    places = _train(root, region, labels) if split == "train" else _test(root, region, labels)
    if not places:
        raise InputError(f"{root} holds no {split} samples of {card.title}; it has features and test_features")
    return LabelledSet(
        card=card,
        split=split,
        task=card.task,
        class_names=card.class_names,
        ids=tuple(places),
        read=partial(_read, places, split),
        files=partial(_files, places),
    )


def _train(root: Path, region: Region, labels: Sequence[Mapping[str, Any]]) -> dict[str, Place]:
    """List the country's samples that are not for tests; crops of an unknown kind are left out where one is asked for.

    A label without a file is one without imagery, as published.
    """
    west, south, east, north = region.box
    places = {}
    for label in labels:
        lon, lat = float(label["lon"]), float(label["lat"])
        unknown = region.crop is not None and label["is_crop"] and label["label"] is None
        if label["is_test"] or unknown or not (west <= lon <= east and south <= lat <= north):
            continue
        id = f"{label['index']}_{label['dataset']}"
        file = root / "features" / "arrays" / f"{id}.h5"
        if file.is_file():
            wanted = label["is_crop"] if region.crop is None else label["label"] == region.crop
            first = _first_day(label["export_end_date"])
            places[id] = Place(file=file, row=None, target=int(wanted), first_day=first, lonlat=(lon, lat))
    return places


def _test(root: Path, region: Region, labels: Sequence[Mapping[str, Any]]) -> dict[str, Place]:
    """List the labelled pixels of the test files, whose year ends in the February that their name tells."""
    places = {}
    for file in sorted((root / "test_features").glob(region.tests)):
        parts = file.stem.split("_")
        listed = (label["export_end_date"] for label in labels if label["dataset"] == file.stem)
        end = f"{parts[2]}-02-01" if len(parts) > 2 else next(listed, None)
        if end is None:
            raise InputError(f"labels.geojson has no sample of {file.stem}, which tells the dates; download it again")
        with open_hdf5(file) as opened:
            targets, lats, lons = (np.asarray(opened[key]) for key in ("y", "lats", "lons"))
        for row in np.flatnonzero(targets >= 0).tolist():
            places[f"{file.stem}/{row}"] = Place(
                file=file,
                row=row,
                target=int(targets[row]),
                first_day=_first_day(end),
                lonlat=(float(lons[row]), float(lats[row])),
            )
    return places


def _first_day(end: str) -> int:
    return parse_day(end) - STEPS * STEP_DAYS


def _files(places: Mapping[str, Place], id: str) -> tuple[Path]:
    return (places[id].file,)


def _values(place: Place) -> Array:
    with open_hdf5(place.file) as file:
        values = np.asarray(file["array"] if place.row is None else file["x"][place.row], np.float32)
    if values.shape != (STEPS, CHANNELS):
        raise InputError(f"{place.file} holds {list(values.shape)}; wanted {STEPS} steps of {CHANNELS} channels")
    return values


def _read(places: Mapping[str, Place], split: str, id: str) -> LabelledSample:
    place = places[id]
    pixels = _values(place)[:, :, None, None]
    days = [place.first_day + STEP_DAYS * step for step in range(STEPS)]
    observations = {
        "sentinel1": observe("sentinel1", pixels[:, :2], days, bands=("vv", "vh")),
        "sentinel2": observe("sentinel2", pixels[:, 2:13], days, bands=S2_BANDS),
        "srtm": observe("srtm", pixels[:1, ELEVATION : ELEVATION + 1], days[:1], bands=("srtm",)),
    }
    return LabelledSample(
        id=id,
        batch=Batch(observations=observations, lonlat=torch.tensor([place.lonlat], dtype=torch.float64)),
        target=torch.tensor([place.target]),
        fold=split,
    )
