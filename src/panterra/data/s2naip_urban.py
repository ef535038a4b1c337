"""S2NAIP-URBAN: cities of the United States in 640 m squares, seen by four sensors, with OpenStreetMap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rasterio.features import rasterize
from shapely.geometry import shape

from panterra.data.labelled import DATASETS, UNDATED, LabelledSample, LabelledSet, check_split
from panterra.data.stored_pixels import Array, load_json, nearest, observe, parse_day, read_image
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.sample import Batch, Observation

CARD = DATASETS["s2naip_urban"]
GRID_PX, NAIP_PX = 64, 512
NAIP_M = 1.25

GROUPS = (
    ("building", "flagpole", "lighthouse", "obelisk", "observatory"),
    ("aerialway_pylon", "airport", "gas_station", "helipad", "parking", "road", "runway", "taxiway"),
    (
        "chimney",
        "petroleum_well",
        "power_plant",
        "power_substation",
        "power_tower",
        "satellite_dish",
        "silo",
        "storage_tank",
        "wind_turbine",
        "works",
    ),
    ("river", "fountain"),
)
CODES = {category: code for code, group in enumerate(GROUPS, start=1) for category in group}
"""Categories of the label files; whatever else they hold is the last class."""

S2_FINE, S2_COARSE = ("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12")
L8_FINE, L8_COARSE = ("B8",), ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11")


def open_s2naip_urban(root: str | Path, split: str) -> LabelledSet:
    """Open a split, which `<split>_dict.json` lists with the dates of each tile."""
    check_split(CARD, split)
    root = Path(root)
    listing = load_json(root / f"{split}_dict.json")
    keys = ("name", "s1_dates", "s2_dates", "l8_dates")
    if not all(key in listing for key in keys):
        raise InputError(f"{split}_dict.json holds {', '.join(listing)}; wanted the lists {', '.join(keys)}")
    tiles = {str(name): dates for name, *dates in zip(*(listing[key] for key in keys), strict=True)}
    return LabelledSet(
        card=CARD,
        split=split,
        task=CARD.task,
        class_names=CARD.class_names,
        ids=tuple(tiles),
        read=partial(_read, root, split, tiles),
        files=partial(_files, root),
    )


def _files(root: Path, name: str) -> tuple[Path, ...]:
    return (
        root / "naip" / f"{name}.png",
        root / "openstreetmap" / f"{name}.geojson",
        root / "sentinel1" / f"{name}.tif",
        *(root / sensor / f"{name}_{size}.tif" for sensor in ("sentinel2", "landsat") for size in (8, 16)),
    )


def _read(root: Path, split: str, tiles: Mapping[str, Sequence[Sequence[Any]]], name: str) -> LabelledSample:
    naip, labels, radar, s2_fine, s2_coarse, l8_fine, l8_coarse = _files(root, name)
    s1_days, s2_days, l8_days = ([parse_day(date) for date in dates] for dates in tiles[name])
    photo, backscatter = read_image(naip), _stacked(radar, 2)
    repeats = round(NAIP_M / MODALITIES["naip"].gsd)
    observations = {
        "naip": observe(
            "naip",
            photo.pixels[None].repeat(repeats, axis=2).repeat(repeats, axis=3),
            [UNDATED],
            bands=("R", "G", "B", "IR"),
        ),
        "landsat": _optical("landsat", (l8_fine, L8_FINE), (l8_coarse, L8_COARSE), l8_days),
        "sentinel2": _optical("sentinel2", (s2_fine, S2_FINE), (s2_coarse, S2_COARSE), s2_days),
        "sentinel1": observe(
            "sentinel1", backscatter, s1_days, bands=("vv", "vh"), valid=(backscatter != 0).any(axis=1)
        ),
    }
    return LabelledSample(
        id=name,
        batch=Batch(observations=observations, lonlat=read_image(s2_fine, bands=[1]).lonlat),
        target=torch.from_numpy(draw(load_json(labels)))[None],
        fold=split,
    )


def _stacked(path: Path, bands: int) -> Array:
    """Read images of several dates, whose bands follow each other in one file."""
    pixels = read_image(path).pixels
    if len(pixels) % bands:
        raise InputError(f"{path} has {len(pixels)} bands; wanted a multiple of {bands}: download it again")
    return pixels.reshape(-1, bands, *pixels.shape[1:])


def _optical(
    modality: str, fine: tuple[Path, Sequence[str]], coarse: tuple[Path, Sequence[str]], days: list[int]
) -> Observation:
    sharp, blurred = (_stacked(path, len(bands)) for path, bands in (fine, coarse))
    # Zero in all bands is what no image covers.
    valid = (sharp != 0).any(axis=1) & nearest((blurred != 0).any(axis=1), GRID_PX)
    smooth = F.interpolate(
        torch.from_numpy(blurred.astype(np.float32)), size=(GRID_PX, GRID_PX), mode="bilinear", align_corners=False
    )
    pixels = np.concatenate([sharp, smooth.round().numpy()], axis=1)
    return observe(modality, pixels, days, bands=(*fine[1], *coarse[1]), valid=valid)


def draw(features: Mapping[str, Any]) -> Array:
    """Draw OpenStreetMap features, whose coordinates are pixels of NAIP, as classes [512, 512].

    Lines are two pixels wide and points have a radius of one; later features cover earlier ones.
    """
    shapes = []
    for feature in features["features"]:
        outline = shape(feature["geometry"])
        category = str(feature["properties"].get("category", "")).replace(" ", "_")
        shapes.append((outline if outline.area else outline.buffer(1), CODES.get(category, len(GROUPS) + 1)))
    if not shapes:
        return np.zeros((NAIP_PX, NAIP_PX), np.int64)
    return np.asarray(rasterize(shapes, out_shape=(NAIP_PX, NAIP_PX), dtype="uint8"), np.int64)
