"""The sensors that look at the planet, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Optics:
    """How a camera turns reflectance into the declared unit: scale * reflectance ** curve + offset."""

    scale: float | tuple[float, ...] = 1e4
    offset: float | tuple[float, ...] = 0.0
    curve: float = 1.0
    limits: tuple[float, float] = (1.0, 65535.0)
    through_air: bool = False
    """True for what arrives above the atmosphere, False for what leaves the ground."""
    low_sun: bool = False
    """True where numbers fall with the sun's height, as radiance does."""
    under_clouds: bool = False
    """True for aircraft, which fly on clear days."""
    hour: float = 10.5
    noise: float = 0.004
    """Relative; a tenth of it is added whatever the brightness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Radar:
    """What a radar sees: backscatter in dB of two polarisations."""

    long_wave: bool = False
    """L-band rather than C-band."""
    looks: int = 1
    """Speckle is the mean of four neighbours of so many looks each."""
    revisit_days: int = 6
    """Ascending and descending passes take turns after so many days."""


_ESUN = (1970.0, 1842.0, 1547.0, 1044.0, 225.7, 82.06)
_ETM_RANGE = ((-6.2, 191.6), (-6.4, 196.5), (-5.0, 152.9), (-5.1, 241.1), (-1.0, 31.06), (-0.35, 10.8))
"""Solar irradiance, and the radiances of DN 1 and 255, in W/m2/um (/sr): high gain but for band 4, as in the Landsat 7
data users handbook."""

# A sensor is a row here: bands, wavelengths and units stand in `MODALITIES`.
SENSORS: dict[str, Optics | Radar] = {
    "sentinel2_l2a": Optics(),
    "sentinel2": Optics(through_air=True),
    "landsat": Optics(scale=50000, offset=5000, through_air=True, low_sun=True, hour=10.2),
    "landsat7": Optics(
        scale=tuple(254 * e / math.pi / (high - low) for e, (low, high) in zip(_ESUN, _ETM_RANGE, strict=True)),
        offset=tuple(1 - 254 * low / (high - low) for low, high in _ETM_RANGE),
        limits=(1, 255),
        through_air=True,
        low_sun=True,
        hour=10.0,
    ),
    "hls": Optics(hour=10.2),
    "modis": Optics(limits=(-100, 16000)),
    "aerial": Optics(
        scale=(455, 470, 490, 250), offset=(-16, -16, -16, 0), curve=0.55, limits=(0, 255), under_clouds=True, hour=11.5
    ),
    "spot": Optics(scale=470, offset=-18, curve=0.55, limits=(0, 255)),
    "planet": Optics(scale=450, offset=-12, curve=0.55, limits=(0, 255)),
    "naip": Optics(scale=(410, 410, 430, 270), offset=-6, curve=0.55, limits=(0, 255), under_clouds=True, hour=11.5),
    "naip_10": Optics(scale=(410, 410, 430, 270), offset=-6, curve=0.55, limits=(0, 255), under_clouds=True, hour=11.5),
    "sentinel1": Radar(),
    "alos2": Radar(long_wave=True, looks=4, revisit_days=14),
}
MAPS = ("srtm", "worldcover", "wri_canopy_height_map")
