"""A year of imagery as one mosaic per 30 days."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from odc.geo.geobox import GeoBox

from panterra.imagery.items import SceneItem
from panterra.imagery.stac import Scene, modality_grid
from panterra.modalities import MODALITIES

PERIODS = 12
PERIOD_DAYS = 30
DAYS_BEFORE = 187
"""From the start of the first period to the centre."""

STORED: dict[str, type[np.integer]] = {
    "sentinel2_l2a": np.uint16,
    "sentinel2": np.uint16,
    "landsat": np.uint16,
    "worldcover": np.uint8,
    "srtm": np.int32,
    "openstreetmap_raster": np.uint8,
    "wri_canopy_height_map": np.uint8,
    "cdl": np.uint8,
    "worldcereal": np.uint8,
}
"""In which type the published corpus keeps a modality; float32 where it is not listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """One modality over a box: a mosaic per period, or a single one of a map."""

    pixels: Float[np.ndarray, "t c h w"]
    """In the declared unit; 0 where not valid."""
    valid: Bool[np.ndarray, "t h w"]


def period_starts(centre: dt.date) -> list[dt.date]:
    """List the first days of the periods around a centre."""
    first = centre - dt.timedelta(days=DAYS_BEFORE)
    return [first + dt.timedelta(days=PERIOD_DAYS * i) for i in range(PERIODS)]


def timestamps_of(centre: dt.date) -> Int[np.ndarray, "12 3"]:
    """Return the starts of the periods as they are stored: day 1-31, month 0-11, year."""
    return np.array([(day.day, day.month - 1, day.year) for day in period_starts(centre)], np.int64)


def compose(
    scene: Scene, modality: str, box: GeoBox, centre: dt.date, *, cloud_cover: Mapping[str, float] | None = None
) -> Composite:
    """Read a modality over a box of the common grid: a mosaic of each period, where a map has one of all its items.

    In a mosaic the first valid pixel wins, the least cloudy item first, then the earliest. `cloud_cover` holds the
    percentage of items by id; of others the part of the box is taken that their mask hides or that they do not reach.
    """
    if MODALITIES[modality].kind == "still":
        seen = scene.read(modality, box)
        return Composite(pixels=seen.pixels[0].numpy(), valid=seen.valid[0].numpy())
    items = [item for item in scene.items if item.modality == modality]
    layers = []
    for start in period_starts(centre):
        end = start + dt.timedelta(days=PERIOD_DAYS)
        layers.append(_mosaic(scene, [i for i in items if start <= i.date < end], modality, box, cloud_cover or {}))
    return Composite(pixels=np.stack([p for p, _ in layers]), valid=np.stack([v for _, v in layers]))


def _mosaic(
    scene: Scene, items: list[SceneItem], modality: str, box: GeoBox, cloud_cover: Mapping[str, float]
) -> tuple[Float[np.ndarray, "c h w"], Bool[np.ndarray, "h w"]]:
    grid = modality_grid(MODALITIES[modality], box)
    pixels = np.zeros((len(MODALITIES[modality].bands), *grid.shape), np.float32)
    valid = np.zeros(grid.shape, np.bool_)
    # Items whose cloud cover nobody states are read to find out, the others only while pixels are missing.
    read = {item: read_item_of(scene, item, box) for item in items if item.id not in cloud_cover}
    cover = {i: 100 * float(1 - read[i].valid.mean()) if i in read else cloud_cover[i.id] for i in items}
    for item in sorted(items, key=lambda item: (cover[item], item.date, item.id)):
        if valid.all():
            break
        layer = read.get(item) or read_item_of(scene, item, box)
        fresh = layer.valid[0] & ~valid
        np.copyto(pixels, layer.pixels[0], where=fresh)
        valid |= fresh
    return pixels, valid


def read_item_of(scene: Scene, item: SceneItem, box: GeoBox) -> Composite:
    """Read a single item over a box."""
    seen = replace(scene, items=(item,)).read(item.modality, box)
    return Composite(pixels=seen.pixels[0].numpy(), valid=seen.valid[0].numpy())


def as_stored(pixels: np.ndarray, modality: str) -> np.ndarray:
    """Turn values into the type in which the published corpus keeps them; beyond its range they are cut off."""
    dtype = STORED.get(modality)
    if dtype is None:
        return pixels.astype(np.float32)
    limits = np.iinfo(dtype)
    whole: np.ndarray = np.rint(pixels).clip(limits.min, limits.max).astype(dtype)
    return whole
