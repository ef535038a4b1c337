"""What the numbers in a file mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from panterra.errors import InputError
from panterra.imagery.items import CONVERSIONS
from panterra.modalities import MODALITIES


@dataclass(frozen=True, slots=True, kw_only=True)
class FileUnit:
    """A unit that files come in: `raw * scale + offset` is the declared unit of the modality, or `unit`."""

    about: str
    scale: float = 1.0
    offset: float = 0.0
    unit: str | None = None
    """One that `Scene.read` converts to the declared unit; None for that unit itself."""


_WORDS = {"dn": "digital numbers", "code": "class codes", "physical": "physical units"}

_FILE_UNITS: dict[str, dict[str, FileUnit]] = {
    "reflectance_1e4": {
        "reflectance_1e4": FileUnit(about="reflectance times 10,000"),
        "reflectance": FileUnit(about="reflectance from 0 to 1", scale=1e4),
    },
    "db": {
        "db": FileUnit(about="decibels"),
        "db_1e2": FileUnit(about="decibels times 100", scale=1e-2),
        "db_1e4": FileUnit(about="decibels times 10,000", scale=1e-4),
        "linear": FileUnit(about="linear power, dB = 10 log10(x)", unit="linear"),
        # JAXA's mosaics (Shimada et al. 2009); WorldCereal and openEO pack Sentinel-1 the same way.
        "jaxa_dn": FileUnit(about="packed amplitude, dB = 20 log10(DN) - 83", scale=10 ** (-83 / 20), unit="amplitude"),
    },
    "index": {
        "index": FileUnit(about="an index from -1 to 1"),
        "index_1e4": FileUnit(about="an index times 10,000", scale=1e-4),
    },
}


def file_units(modality: str) -> dict[str, FileUnit]:
    """List the units that files of a modality may come in, by name; the declared one is first."""
    declared = MODALITIES[modality].unit
    return _FILE_UNITS.get(declared, {declared: FileUnit(about=_WORDS.get(declared, declared))})


def file_unit(modality: str, name: str) -> FileUnit:
    """Look a unit up by its name."""
    known = file_units(modality)
    if name not in known:
        raise InputError(f"{modality} cannot come in unit {name!r}; give --unit one of: {', '.join(known)}")
    return known[name]


def to_declared(modality: str, values: npt.NDArray[Any], unit: FileUnit) -> npt.NDArray[np.float32]:
    """Bring raw numbers to the declared unit, as `Scene.read` does."""
    scaled = np.asarray(values * unit.scale + unit.offset, np.float32)
    return scaled if unit.unit is None else CONVERSIONS[unit.unit, MODALITIES[modality].unit](scaled)


def plausible_units(modality: str, values: npt.NDArray[Any]) -> tuple[str, ...]:
    """Name the units in which `values` (valid raw numbers, any shape) could be this modality; none may fit.

    The ranges are wide ones for whole scenes with all bands pooled.
    """
    declared = MODALITIES[modality].unit
    if values.size == 0:
        return (declared,)
    low, middle, high = np.percentile(np.asarray(values, np.float64), (2, 50, 98))
    if declared == "reflectance_1e4":
        fits = {
            "reflectance_1e4": high > 255 and low > -2000 and high < 30000 and middle >= 0,
            "reflectance": low >= -0.2 and 0.002 < middle < 2 and high <= 3,
        }
    elif declared == "db":
        # Raw GRD numbers, which the annotation must calibrate, would be far too dark when read as packed amplitude.
        darkest = -28 if modality == "sentinel1" else -36
        fits = {
            "db": low < -3 and -45 < middle < -3 and high < 40,
            "db_1e2": low < -300 and -4500 < middle < -300,
            "db_1e4": low < -30_000 and -450_000 < middle < -30_000,
            "linear": low >= 0 and 1e-5 < middle < 2 and high < 100,
            "jaxa_dn": low >= 0 and middle > 10 and darkest < 20 * np.log10(max(middle, 1)) - 83 < 5,
        }
    elif declared == "index":
        fits = {"index": low > -1.05 and high < 1.05, "index_1e4": low > -10_500 and 2 < high < 10_500}
    elif modality == "landsat":
        fits = {"dn": low >= 0 and middle > 4500}
    elif declared == "dn":
        fits = {"dn": low >= 0 and 1 < high <= 255}
    elif declared == "fraction":
        fits = {"fraction": low >= 0 and high <= 1}
    else:
        fits = {declared: True}
    return tuple(name for name, fit in fits.items() if fit)


def darkest_pixels(bands: Mapping[str, npt.NDArray[Any]]) -> dict[str, float]:
    """Return the level of each band's darkest pixels, NaN left out."""
    return {band: float(np.nanpercentile(v, 0.5)) for band, v in bands.items() if np.isfinite(v).sum() >= 100}


def offset_kept(bands: Mapping[str, npt.NDArray[Any]]) -> Literal["kept", "removed", "removed twice", "unsure"]:
    """Judge by the darkest pixels of each band whether Sentinel-2's offset of 1000 is in the numbers.

    With it nothing is darker than about 1000 in any band, and shadow, water or leaves come near it in red and blue.
    Deserts, clouds and snow are bright without it, and stay unsure.
    """
    dark = darkest_pixels(bands)
    if not dark:
        return "unsure"
    darkest = min(dark.values())
    if darkest < -400:
        return "removed twice"
    if darkest < 900:
        return "removed"
    # Nothing but the offset makes the cirrus band bright: water vapour hides the ground from it.
    near = darkest < 1400 and ("B10" in dark or (dark.get("B04", 0) < 1700 and dark.get("B02", 0) < 1900))
    return "kept" if near else "unsure"
