"""What was seen of one modality at one date: its files, and how their numbers read."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.imagery.raster import Bools, Floats

MODALITY = "panterra:modality"
"""The property by which an item says which row of `MODALITIES` it is."""

INDEX = "panterra:index"
"""Which band of its file a band is, counted from 1, where bands are listed in another order."""

MASKS: Mapping[str, Callable[[Floats], Bools]] = {
    # Sentinel-2 scene classes: no data, saturated, cloud shadow, medium and high cloud probability, thin cirrus.
    "scl": lambda v: ~np.isin(v, (0, 1, 3, 8, 9, 10)),
    # Landsat Collection 2 QA_PIXEL, bits 0-4: fill, dilated cloud, cirrus, cloud, cloud shadow.
    "qa_pixel": lambda v: (v.astype(np.int64) & 0b11111) == 0,
    # DEA's Fmask codes: no data, cloud, cloud shadow.
    "fmask": lambda v: ~np.isin(v, (0, 2, 3)),
    # PALSAR mosaic: no data, layover, shadowing.
    "palsar": lambda v: ~np.isin(v, (0, 100, 150)),
    # GDAL's convention for masks, also that of our own scenes.
    "valid": lambda v: v != 0,
}
"""Which codes of a mask are data."""

OWN_MASKS = {"scl": "scl", "qa": "qa_pixel", "qa_pixel": "qa_pixel", "valid": "valid", "mask": "valid"}
"""The key of a mask asset in a scene of ours -> how its codes read."""

CONVERSIONS: Mapping[tuple[str, str], Callable[[Floats], Floats]] = {
    ("reflectance", "reflectance_1e4"): lambda v: v * np.float32(1e4),
    ("linear", "db"): lambda v: 10 * np.log10(np.maximum(v, np.float32(1e-10))),
    ("amplitude", "db"): lambda v: 20 * np.log10(np.maximum(v, np.float32(1e-5))),
    ("fraction", "percent"): lambda v: v * np.float32(100),
    ("percent", "fraction"): lambda v: v / np.float32(100),
}
"""Exact ways from the unit of a file to the declared unit; `linear` is power, `amplitude` its square root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneBand:
    """One band of a file: `raw * scale + offset` is in `unit`."""

    name: str
    """As in `MODALITIES`."""
    index: int = 1
    nodata: float | None = None
    """In the file's raw values; the file's own nodata value counts as well."""
    scale: float | None = None
    """None: as the file itself says."""
    offset: float | None = None
    unit: str | None = None
    """None: the declared unit of the modality."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneAsset:
    """One file and the bands it holds."""

    href: str
    bands: tuple[SceneBand, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneItem:
    """One modality at one date, as files."""

    id: str
    modality: str
    date: dt.date
    assets: tuple[SceneAsset, ...]
    mask: tuple[str, str] | None = None
    """Where the mask is and which of `MASKS` reads it."""
    grid: GeoBox | None = None
    """The finest grid of its files, where the metadata tell it."""
    decisions: tuple[str, ...] = ()
    """What was concluded from the metadata, one sentence each."""

    @property
    def bands(self) -> tuple[str, ...]:
        """The names of its bands, in the order of its files."""
        return tuple(band.name for asset in self.assets for band in asset.bands)


def resolve(href: str, base: str | None) -> str:
    """Complete an address that is relative to the folder or address where the item lies."""
    if base is None or "://" in href or href.startswith("/"):
        return href
    if base.startswith(("http://", "https://")):
        return urljoin(base, href)
    return str(Path(base).parent / href)


def date_of(raw: Mapping[str, Any]) -> dt.date:
    """Read the day of a STAC item; of a composite, its first."""
    properties = raw["properties"]
    text = properties.get("datetime") or properties.get("start_datetime")
    try:
        return dt.datetime.fromisoformat(str(text)).date()
    except ValueError:
        raise InputError(f"item {raw['id']} has the date {text!r}; wanted one like 2024-05-01T10:00:00Z") from None
