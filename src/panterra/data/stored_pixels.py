"""Pixels as data sets store them, brought to bands, units and days that a `Batch` declares."""

from __future__ import annotations

import csv
import datetime as dt
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import rasterio
import torch
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform

from panterra.errors import InputError
from panterra.imagery.stac import SUBSTITUTES
from panterra.imagery.units import file_unit, to_declared
from panterra.modalities import MODALITIES
from panterra.sample import Observation, to_days

Array = npt.NDArray[Any]

S2_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""How nearly all data sets store Sentinel-2's ten bands of 10 and 20 m."""


def observe(
    modality: str,
    pixels: Array,
    days: Sequence[int],
    *,
    bands: Sequence[str],
    valid: npt.ArrayLike | None = None,
    unit: str | None = None,
) -> Observation:
    """Build one sample's observation from stored pixels [T, C, H, W], in order of time.

    `bands` names C; the nearest in wavelength stands in for an absent band, as for scenes. `unit` is one of
    `panterra.imagery.units.file_units`, where it is not the declared one. Pixels that are not finite in all bands are
    invalid, and so is radar power of zero.
    """
    stored = np.asarray(pixels, np.float32)
    if stored.shape[1] != len(bands):
        raise InputError(f"{modality} is stored with {stored.shape[1]} bands; wanted {len(bands)}: {', '.join(bands)}")
    if len(days) != len(stored):
        raise InputError(f"{modality} has {len(stored)} images and {len(days)} dates; the download is damaged")
    seen = np.asarray(np.isfinite(stored).all(axis=1))
    if unit in ("linear", "jaxa_dn"):
        seen &= (stored > 0).all(axis=1)
    if valid is not None:
        seen &= np.asarray(valid)
    values = np.nan_to_num(stored, posinf=0, neginf=0)
    if unit is not None:
        values = to_declared(modality, values, file_unit(modality, unit))
    sources = _sources(modality, bands)
    order = np.argsort(np.asarray(days, np.int64), kind="stable")
    return Observation.build(values[order][:, sources], [int(days[i]) for i in order], seen[order])


def _sources(modality: str, bands: Sequence[str]) -> list[int]:
    stand_ins, sources = SUBSTITUTES.get(modality, {}), []
    for name in MODALITIES[modality].band_names:
        source = name
        for _ in range(2):
            source = source if source in bands else stand_ins.get(source, source)
        if source not in bands:
            raise InputError(f"{modality} is stored without {name}, for which no other band may stand in")
        sources.append(bands.index(source))
    return sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A raster file."""

    pixels: Array
    """[C, H, W] as stored."""
    lonlat: torch.Tensor | None
    """float64 [1, 2], the centre, where the file says where it lies."""


def read_image(path: Path, *, bands: Sequence[int] | None = None) -> Image:
    """Read a GeoTIFF or PNG; bands count from 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(path) as file:
                pixels = file.read(None if bands is None else list(bands))
                centre = file.transform @ (file.width / 2, file.height / 2)
                crs = file.crs
        except RasterioError as error:
            raise InputError(f"cannot read {path} ({error}); download it again") from None
    return Image(pixels=pixels, lonlat=None if crs is None else to_lonlat(crs, *centre))


def to_lonlat(crs: Any, x: float, y: float) -> torch.Tensor:
    """Bring a point to longitude and latitude, [1, 2]."""
    lon, lat = transform(crs, "EPSG:4326", [x], [y])
    return torch.tensor([[lon[0], lat[0]]], dtype=torch.float64)


def nearest(pixels: Array, size: int) -> Array:
    """Bring the last two axes to `size` by taking the pixel at floor(i * old / new), as torch does."""
    rows, cols = (np.arange(size) * side // size for side in pixels.shape[-2:])
    return np.asarray(pixels[..., rows[:, None], cols])


def parse_day(text: Any) -> int:
    """Count days since 1970-01-01 of YYYYMMDD, with or without separators or a time after it, or of a date."""
    if isinstance(text, dt.date):
        return to_days(text)
    if isinstance(text, np.datetime64):
        return int(text.astype("datetime64[D]").astype(np.int64))
    digits = "".join(c for c in str(text) if c.isdigit())[:8]
    try:
        return to_days(dt.datetime.strptime(digits, "%Y%m%d").date())
    except ValueError:
        raise InputError(f"{text!r} is not a date; wanted YYYYMMDD") from None


def load_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(_present(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}); download it again") from None


def load_rows(path: Path) -> list[dict[str, str]]:
    """Read a table with a header line."""
    with _present(path).open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def column(rows: Iterable[Mapping[str, str]], name: str, path: Path) -> list[str]:
    """Take one column of a table."""
    try:
        return [row[name] for row in rows]
    except KeyError:
        raise InputError(f"{path} has no column {name!r}; download it again") from None


def load_npy(path: Path) -> Array:
    """Read a NumPy array."""
    return np.asarray(np.load(_present(path), allow_pickle=False))


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file to read."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"cannot read {path} as HDF5 ({error}); download it again") from None


def _present(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give the folder that holds the data set, or complete the download")
    return path
