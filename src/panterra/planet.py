"""A procedural planet whose every pixel is known.

Everything is a pure function of the seed, the place in metres of EPSG:32633 and the date: random numbers are hashes of
places, so a window shows what a larger one shows there, bit for bit at the same pixel size on the same machine.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.windows import Window

from panterra.errors import InputError
from panterra.imagery.raster import CogWriter
from panterra.imagery.stac import make_item, save_scene
from panterra.modalities import MODALITIES, Band
from panterra.sample import to_date, to_days

Array: TypeAlias = npt.NDArray[Any]
Tint: TypeAlias = tuple[int, int, int]

CRS = "EPSG:32633"
LATITUDE = 48.0
"""The sun stands over the whole planet as it does here, in degrees north."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """One kind of land cover in the truth."""

    name: str
    code: int
    colour: Tint
    worldcover: int
    """The code of ESA WorldCover that contains it."""


CLASSES = (
    Class(name="water", code=1, colour=(54, 112, 178), worldcover=80),
    Class(name="broadleaf forest", code=2, colour=(88, 150, 62), worldcover=10),
    Class(name="conifer forest", code=3, colour=(26, 92, 60), worldcover=10),
    Class(name="grassland", code=4, colour=(172, 212, 106), worldcover=30),
    Class(name="wetland", code=5, colour=(104, 186, 170), worldcover=90),
    Class(name="winter wheat", code=6, colour=(228, 190, 88), worldcover=40),
    Class(name="rapeseed", code=7, colour=(246, 232, 48), worldcover=40),
    Class(name="maize", code=8, colour=(236, 138, 40), worldcover=40),
    Class(name="alfalfa", code=9, colour=(160, 98, 178), worldcover=40),
    Class(name="built-up", code=10, colour=(206, 62, 62), worldcover=50),
    Class(name="bare ground", code=11, colour=(156, 142, 128), worldcover=60),
)

# Reflectance in percent at these wavelengths (micrometres), set by hand to the shapes and levels of such surfaces
# in spectral libraries and in satellite images. A band takes the value at its centre.
WAVELENGTHS = (0.44, 0.49, 0.56, 0.61, 0.665, 0.705, 0.74, 0.783, 0.84, 0.945, 1.24, 1.375, 1.61, 2.2)
SPECTRA: dict[str, tuple[float, ...]] = {
    "crop": (2.2, 2.8, 6.5, 5, 3.2, 11, 34, 44, 47, 46, 43, 12, 24, 11),
    "grass": (2.8, 3.6, 7.5, 6.5, 5, 12, 29, 36, 39, 39, 38, 14, 26, 14),
    "broadleaf": (1.6, 2.0, 4.9, 3.5, 2.3, 8.5, 28, 36, 39, 38, 36, 10, 19, 8.5),
    "conifer": (1.3, 1.6, 3.0, 2.4, 1.8, 5, 15, 19.5, 21, 20, 17, 5, 9.5, 4),
    "reed": (3, 3.6, 6, 6, 5.5, 10, 20, 24, 26, 25, 23, 8, 15, 8),
    "straw": (7, 9.5, 14, 18, 21.5, 25, 27.5, 29.5, 32, 34, 42, 32, 40, 29),
    "autumn": (3, 3.8, 6.5, 11, 13, 17, 24, 28, 31, 31, 34, 18, 26, 15),
    "blossom": (2.6, 3.8, 15.5, 16.5, 14.5, 21, 38, 46, 50, 49, 44, 13, 25, 12),
    "loam": (5.8, 7.8, 10.5, 12.2, 13.6, 15.5, 17.6, 19, 21, 23.5, 29, 26, 33, 29),
    "litter": (2, 2.6, 4.2, 4.9, 5.4, 7.8, 11.5, 13, 14.5, 16, 21, 14, 20, 14),
    "clear water": (4, 3.6, 2.8, 1.8, 1.3, 1, 0.8, 0.7, 0.6, 0.5, 0.3, 0.2, 0.2, 0.1),
    "turbid water": (5.5, 6.8, 9, 8.5, 7.5, 6, 3.5, 3, 2.5, 1.5, 0.6, 0.4, 0.5, 0.3),
    "asphalt": (8.3, 8.9, 9.6, 10, 10.3, 10.6, 11, 11.6, 12, 12.5, 14, 14, 15.5, 15),
    "gravel": (9.5, 11.5, 13.8, 15, 16, 17, 19, 20, 21, 22, 27, 26, 30, 28),
    "tile": (5.2, 5.8, 7.4, 10.6, 13.8, 15.4, 16.6, 18, 20, 22, 28, 28, 32, 30),
    "slate": (8.4, 8.8, 9.2, 9.4, 9.6, 9.8, 10, 10.5, 11, 12, 14, 14, 15, 15),
    "metal": (18, 19.5, 20.5, 21, 21.3, 21.6, 22, 22.3, 22.7, 23, 25, 25, 25, 24),
    "rock": (10.5, 12, 14.2, 15.8, 17, 18, 19, 20, 21, 22, 26, 25, 29, 28),
    "cloud": (72, 73, 73, 73, 73, 73, 73, 73, 73, 70, 66, 64, 52, 40),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """What covers the ground somewhere: its year, its colours, its echo."""

    code: int
    """The class it belongs to."""
    ground: str = "loam"
    """Spectrum below the plants."""
    green: str = "crop"
    bloom: str = "blossom"
    years: tuple[str, ...] = ("1:0",)
    """Calendars, of which each stand follows one: knots "day of year:green+dry+blooming", the shares of the ground in
    percent; straight lines between them, the year being a circle."""
    mixed: str = ""
    """A cover that grows among it, up to half of a stand."""
    spread: float = 1.0
    """How much stands differ from each other in time; 1 is about ten days either way."""
    variety: float = 1.0
    """How much stands differ from each other in brightness and hue."""
    texture: float = 0.03
    """Contrast between neighbouring pixels of 10 m."""
    heat: float = 0.0
    """Kelvin above grass at noon in summer."""
    c_bare: tuple[float, float] = (-12.0, -20.0)
    """C-band backscatter in dB, co- and cross-polarised, without plants."""
    c_full: tuple[float, float] = (-11.5, -18.0)
    """The same under a closed canopy."""
    l_bare: tuple[float, float] = (-16.5, -27.0)
    l_full: tuple[float, float] = (-14.0, -22.5)


# fmt: off
SURFACES: dict[str, Surface] = {
    "water": Surface(
        code=1, ground="clear water", green="turbid water", spread=2.5, variety=0.5, texture=0.015, heat=-4,
        c_bare=(-20.5, -27.5), c_full=(-20, -27), l_bare=(-24, -34), l_full=(-24, -34),
        years=(
            "1:55 110:75 250:40",
        ),
    ),
    "broadleaf": Surface(
        code=2, ground="litter", green="broadleaf", bloom="autumn", mixed="needles", spread=0.7, texture=0.11,
        heat=-3, c_bare=(-9.6, -15.8), c_full=(-8.9, -14.2), l_bare=(-8, -13), l_full=(-7.5, -12.4),
        years=(
            "1:10+8 95:14+6 112:60 130:97 210:92 262:85+0+5 286:35+0+55 308:12+8+25 330:10+10",
            "1:14+6 102:16+6 119:60 138:95 210:90 270:85+0+5 296:40+0+50 318:14+6+20 335:14+8",
        ),
    ),
    "conifer": Surface(
        code=3, ground="litter", green="conifer", mixed="tree", texture=0.1, heat=-3, c_bare=(-9.6, -15.4),
        c_full=(-9.3, -14.9), l_bare=(-8.2, -13.2), l_full=(-7.8, -12.8),
        years=(
            "1:84 150:93 200:97 300:86",
            "1:70+3 150:80 200:88 300:74+3",
        ),
    ),
    "grassland": Surface(
        code=4, green="grass", mixed="ley", spread=1.4, variety=1.2, c_full=(-11.6, -18.6),
        years=(
            "1:55+25 75:60+20 125:90 148:95+2 152:50+30 180:85+5 200:88+8 204:50+35 240:80+10 300:72+15 340:60+25",
            "1:50+30 80:55+25 130:80+5 180:66+20 220:52+35 270:65+20 320:60+25",
            "1:45+15 80:50+10 112:85 132:93 136:40+20 160:85 176:90 180:40+20 206:80+5 222:85+5 226:40+20 "
            "262:80+5 320:60+10",
            "1:35+50 90:40+45 140:80+12 172:75+20 205:50+42 212:35+45 260:60+25 310:50+40",
        ),
    ),
    "wetland": Surface(
        code=5, ground="turbid water", green="reed", mixed="margin", spread=1.2, variety=1.4, texture=0.07, heat=-3,
        c_full=(-9.2, -16.2), l_bare=(-13, -24), l_full=(-11, -20.5),
        years=(
            "1:10+55 110:15+50 160:70+12 230:75+12 285:30+50 330:12+60",
            "1:25+20 105:30+20 150:65+5 240:70+10 290:40+30 330:25+25",
        ),
    ),
    "wheat": Surface(
        code=6, c_bare=(-11.5, -19.8), c_full=(-14.6, -19.2),
        years=(
            "1:30+3 62:36+3 100:70 125:95 152:95+2 172:70+25 188:22+72 199:4+92 202:3+70 228:8+50 242:3+12 "
            "278:3+5 302:15+3 335:28+3",
            "1:22+3 68:28+3 108:60 133:93 158:94+2 178:70+25 194:20+74 206:4+90 209:4+60 226:10+30 255:55+5 "
            "285:68+3 292:10+15 310:8+5 340:18+3",
        ),
    ),
    "rapeseed": Surface(
        code=7, c_bare=(-11.8, -19.5), c_full=(-11, -14.8),
        years=(
            "1:50+8 65:52+8 92:85 104:85+0+8 112:25+0+70 128:20+0+76 138:85+0+6 165:85+8 184:35+55 194:6+85 "
            "197:4+60 225:15+30 236:3+10 252:12+5 285:60+2 325:60+4",
            "1:32+6 70:34+6 100:72 114:80+0+4 121:40+0+42 134:40+0+45 144:80+0+5 168:80+10 188:40+48 200:6+85 "
            "203:4+50 226:45+20 250:50+10 262:5+8 285:25+3 325:40+4",
        ),
    ),
    "maize": Surface(
        code=8, c_bare=(-11.2, -19.5), c_full=(-10.6, -15.8), l_full=(-12.5, -20.5),
        years=(
            "1:4+16 90:6+10 110:2+3 138:4+2 160:35 180:80 198:96 238:92+3 258:65+30 274:25+65 278:3+45 310:3+25",
            "1:50+5 80:60+5 112:70+5 118:5+15 146:4+3 168:35 188:80 206:95 240:90+4 256:70+22 260:4+35 285:15+10 "
            "320:45+5",
        ),
    ),
    "alfalfa": Surface(
        code=9, mixed="margin", c_bare=(-11.8, -19.5), c_full=(-11.2, -17.4),
        years=(
            "1:32+15 80:42+8 110:80 130:95 134:25+15 152:80 168:95 172:25+15 192:80 208:92 212:25+15 236:80 "
            "252:88 256:25+12 285:60+4 320:45+10",
            "1:10+12 80:10+10 92:3+2 125:20 150:60 178:92 182:25+15 205:80 226:92 230:25+15 265:75+3 320:45+10",
            "1:28+18 85:40+10 125:85 148:95 152:25+16 172:80 192:94 196:25+15 220:80 240:90 244:25+14 280:65+4 "
            "320:42+12",
        ),
    ),
    "garden": Surface(
        code=10, green="grass", spread=1.2, variety=2, texture=0.1, heat=4, c_bare=(-8.5, -15.5), c_full=(-8, -14.5),
        l_bare=(-9, -18), l_full=(-9, -17.5),
        years=(
            "1:40+10 120:62+3 200:55+12 300:50+10",
            "1:25+5 120:40+2 200:38+8 300:33+6",
        ),
    ),
    "yard": Surface(
        code=10, ground="asphalt", green="grass", variety=2, texture=0.12, heat=8,
        c_bare=(-7.5, -15.5), c_full=(-7.5, -15.5), l_bare=(-8, -18), l_full=(-8, -18),
        years=(
            "1:6 140:12 300:8",
        ),
    ),
    "bare": Surface(
        code=11, ground="rock", green="grass", mixed="margin", variety=1.6, texture=0.08, heat=7, c_bare=(-10.8, -19),
        l_bare=(-13.5, -23.5),
        years=(
            "1:2+3 140:7+2 300:3+3",
        ),
    ),
    "track": Surface(code=11, ground="gravel", heat=4, c_bare=(-12.5, -21)),
    "road": Surface(code=10, ground="asphalt", variety=0.8, heat=8, c_bare=(-14.5, -23)),
    "tile roof": Surface(code=10, ground="tile", variety=1.8, heat=11, c_bare=(-2.5, -10.5), l_bare=(-1.5, -12)),
    "slate roof": Surface(code=10, ground="slate", variety=1.8, heat=12, c_bare=(-2.5, -10.5), l_bare=(-1.5, -12)),
    "metal roof": Surface(code=10, ground="metal", variety=1.8, heat=9, c_bare=(-0.5, -8.5), l_bare=(0, -10.5)),
}
# fmt: on
SURFACES["margin"] = SURFACES["grassland"]
SURFACES["ley"] = SURFACES["alfalfa"]
SURFACES["needles"] = SURFACES["conifer"]
SURFACES["stream"] = SURFACES["water"]
SURFACES["tree"] = SURFACES["broadleaf"]
_KIND = {name: number for number, name in enumerate(SURFACES)}
_COVERS = ("stream", "track", "road", "tile roof", "slate roof", "metal roof", "margin", "ley", "tree", "needles")
"""Surfaces that lie over others or grow among them; each comes in `_VARIANTS` hues."""
_VARIANTS = 16
_TOWN_SPACING = 4600.0
_CROWN = 5.0
"""Metres from the stem of a tree to the end of its longest branch, at most."""

# The sun that casts the shadows of trees and houses, whatever the date: half past ten in early summer.
_SHADOW_AZIMUTH, _SHADOW_SLOPE, _SHADOW_REACH = math.radians(152.0), math.tan(math.radians(53.0)), 15.0


# Random numbers from places.


def _hash(*keys: Array | int | str) -> Array:
    """Mix integers, arrays of them and names into uint64 of their common shape (splitmix64, once per key)."""
    mixed: Array = np.uint64(0x9E3779B97F4A7C15)  # type: ignore[assignment]
    with np.errstate(over="ignore"):
        for key in keys:
            number = zlib.crc32(key.encode()) if isinstance(key, str) else key
            mixed = mixed ^ np.asarray(number).astype(np.uint64)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def _draw(*keys: Array | int | str) -> Array:
    """Draw uniform float32 in [0, 1) from what `_hash` makes of the keys."""
    return (_hash(*keys) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _grain(x: Array, y: Array, *keys: Array | int | str) -> Array:
    """Hash every pixel of integer columns x and rows y to 16 bits, for tables of quantiles."""
    across = _hash(*keys, "across", x).astype(np.uint32)
    mixed = _hash(*keys, "down", y).astype(np.uint32)[:, None] + across
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x7FEB352D)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x846CA68B)
    return mixed >> np.uint32(16)


@cache
def _normal_table() -> Array:
    inverse = NormalDist().inv_cdf
    coarse = np.array([inverse((i + 0.5) / 4096) for i in range(4096)], np.float32)
    return np.repeat(coarse, 16)


@cache
def _exponential_table() -> Array:
    return (-np.log((np.arange(65536) + 0.5) / 65536)).astype(np.float32)


def _normal(x: Array, y: Array, *keys: Array | int | str) -> Array:
    return _normal_table().take(_grain(x, y, *keys))


def _spline(t: Array, wavelength: float, dtype: type) -> tuple[Array, list[Array]]:
    """Give the first knot of each place and the weights of its four knots (uniform cubic B-spline)."""
    scaled = t / wavelength
    knot = np.floor(scaled)
    f: Array = (scaled - knot).astype(dtype)
    g = 1 - f
    weights = [g * g * g / 6, (4 - 6 * f * f + 3 * f * f * f) / 6, (4 - 6 * g * g + 3 * g * g * g) / 6, f * f * f / 6]
    return knot.astype(np.int64) - 1, weights


def _noise(x: Array, y: Array, wavelength: float, *keys: Array | int | str, dtype: type = np.float32) -> Array:
    """Make smooth noise [len(y), len(x)] of mean 0 and variance 1 with features of about the wavelength in metres."""
    (col, across), (row, down) = _spline(x, wavelength, dtype), _spline(y, wavelength, dtype)
    cols, rows = np.arange(col.min(), col.max() + 4), np.arange(row.min(), row.max() + 4)
    knots = _draw(*keys, rows[:, None], cols) * 7.22 - 3.61  # a sum of knots has 0.277 of a knot's range
    col, row = col - cols[0], row - rows[0]
    lines = knots[row] * down[0][:, None]
    for k in (1, 2, 3):
        lines += knots[row + k] * down[k][:, None]
    noise: Array = lines.take(col, axis=1) * across[0]
    for k in (1, 2, 3):
        noise += lines.take(col + k, axis=1) * across[k]
    return noise


def _octaves(
    x: Array, y: Array, weights: dict[float, float], *keys: Array | int | str, dtype: type = np.float32
) -> Array:
    """Add noise of several wavelengths to variance 1, leaving out what pixels cannot show."""
    total: Array = np.zeros((len(y), len(x)), dtype)
    for wavelength, weight in weights.items():
        if wavelength > 1.5 * round(float(x[1] - x[0]), 3):
            total += _noise(x, y, wavelength, *keys, int(wavelength), dtype=dtype) * weight
    total /= math.hypot(*weights.values())
    return total


# The ground: what lies where, before any date.


class _Grid(NamedTuple):
    """Where a box is sampled: a margin around it for shadows, and several samples in a coarse pixel."""

    x: Array
    """float64 [columns], metres, west to east."""
    y: Array
    """float64 [rows], metres, north to south."""
    step: float
    per_pixel: int
    """Samples along a pixel's side."""
    margin: tuple[int, int, int, int]
    """Pixels added west, north, east and south, such that blocks of six absolute pixels are whole."""


def _grid(box: GeoBox) -> _Grid:
    affine = box.affine
    north_up = affine.b == 0 and affine.d == 0 and affine.a > 0 and affine.e < 0
    if box.crs is None or box.crs.epsg != 32633 or not north_up or abs(affine.a + affine.e) > 1e-9 * affine.a:
        raise InputError(
            f"a box in {box.crs} with {tuple(affine)[:6]} came; the planet needs square north-up pixels in {CRS}"
        )
    pixel = affine.a
    per_pixel = max(1, math.ceil(pixel / 25))
    step = pixel / per_pixel
    around = 6 * math.ceil(((_SHADOW_REACH + _CROWN) / pixel + 2) / 6)
    left, bottom = math.floor(affine.c / pixel + 1e-6), math.floor(affine.f / pixel + 1e-6) - box.height
    west, south = around + left % 6, around + bottom % 6
    east, north = around + -(left + box.width) % 6, around + -(bottom + box.height) % 6
    cols = np.arange(-west * per_pixel, (box.width + east) * per_pixel) + 0.5
    rows = np.arange(-north * per_pixel, (box.height + south) * per_pixel) + 0.5
    # Rounding makes a place the same number whatever box it is counted from.
    x, y = np.round(affine.c + cols * step, 4), np.round(affine.f - rows * step, 4)
    return _Grid(x=x, y=y, step=step, per_pixel=per_pixel, margin=(west, north, east, south))


class _Layer(NamedTuple):
    """Something over part of some pixels."""

    where: Array
    """int64 [n], flat indices of samples."""
    cover: Array
    """float32 [n], the share of each sample under it."""
    row: Array
    """int64 [n], its row in the table of stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What lies where in a box, for any date and sensor; arrays are on the sample grid, margin included."""

    seed: int
    box: GeoBox
    grid: _Grid
    stand: Array
    """intp [H, W], the row in `kind` and `key` of the field, forest stand, garden ... that a sample belongs to."""
    kind: Array
    """intp [n], number of the stand's surface in `SURFACES`."""
    key: Array
    """uint64 [n], the stand's own number: the seed of whatever is particular to it."""
    layers: tuple[_Layer, ...]
    """Roads, roofs, trees: each lies over the ones before."""
    vigour: Array
    """float32 [H, W], how well plants grow compared with their stand; mean 0."""
    wet: Array
    """float32 [H, W], darkness of the soil compared with its stand; mean 0."""
    elevation: Array
    east: Array
    """float32 [H, W], rise of the terrain per metre eastwards."""
    north: Array
    shade: Array
    """float32 [H, W], light that texture and the shadows of trees and houses leave."""
    height: Array
    """float32 [H, W], metres of trees and houses above the terrain."""
    code: Array
    """uint8 [H, W], class codes."""


class _Voronoi(NamedTuple):
    """Cells around jittered sites: straight borders, no two alike."""

    key: Array
    """uint64 [H, W]"""
    pair: Array
    """uint64 [H, W], one number for the nearest border, the same from both sides."""
    u: Array
    """float32 [H, W], metres along the cell's own direction."""
    v: Array
    edge: Array
    """float32 [H, W], metres to the nearest border."""
    cos: Array
    """float32 [H, W], of the angle from east to u."""
    sin: Array
    cell: Array
    """intp [H, W], index into tables with a row per lattice cell."""
    sites: Array
    """uint64 [rows, columns], that table of keys."""
    centres: tuple[Array, Array]
    """Columns and rows of the lattice, in metres."""

    def draw(self, name: str) -> Array:
        """Draw a number per cell and spread it over the pixels."""
        return _draw(self.sites, name).take(self.cell)


def _voronoi(x: Array, y: Array, size: float, *keys: Array | int | str) -> _Voronoi:
    col, row = np.floor(x / size), np.floor(y / size)
    cols, rows = np.arange(col.min() - 1, col.max() + 2), np.arange(row.min() - 1, row.max() + 2)
    key = _hash(*keys, rows[:, None].astype(np.int64), cols.astype(np.int64))
    site_x, site_y = (0.1 + 0.8 * _draw(key, "x")) * np.float32(size), (0.1 + 0.8 * _draw(key, "y")) * np.float32(size)
    in_x, in_y = (x - col * size).astype(np.float32), (y - row * size).astype(np.float32)[:, None]
    base = (row - rows[0]).astype(np.intp)[:, None] * len(cols) + (col - cols[0]).astype(np.intp)
    first = np.full(base.shape, np.inf, np.float32)
    second, u, v = first.copy(), first.copy(), first.copy()
    nearest, other = base.copy(), base.copy()
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            at = base + (i * len(cols) + j)
            dx, dy = in_x - (site_x.take(at) + j * size), in_y - (site_y.take(at) + i * size)
            distance = dx * dx + dy * dy
            closer = distance < first
            runner = ~closer & (distance < second)
            np.copyto(other, at, where=runner)
            np.copyto(other, nearest, where=closer)
            np.copyto(second, distance, where=runner)
            np.copyto(second, first, where=closer)
            for target, value in ((first, distance), (nearest, at), (u, dx), (v, dy)):
                np.copyto(target, value, where=closer)
    place_x = (cols * size + site_x).astype(np.float64)
    place_y = (rows[:, None] * size + site_y).astype(np.float64)
    apart = np.hypot(place_x.take(nearest) - place_x.take(other), place_y.take(nearest) - place_y.take(other))
    angle = _draw(key, "angle") * np.float32(np.pi)
    cos, sin = np.cos(angle).take(nearest), np.sin(angle).take(nearest)
    mine, theirs = key.take(nearest), key.take(other)
    return _Voronoi(
        key=mine,
        pair=mine ^ theirs,
        u=u * cos + v * sin,
        v=v * cos - u * sin,
        edge=((second - first) / (2 * apart)).astype(np.float32),
        cos=cos,
        sin=sin,
        cell=nearest,
        sites=key,
        centres=((cols + 0.5) * size, (rows + 0.5) * size),
    )


def _cut(t: Array, size: Array | float, *keys: Array | int | str) -> tuple[Array, Array, Array]:
    """Cut a line into pieces of irregular length around `size`; give each place its piece's number, start and end."""
    number = np.floor(t / size)
    start = (number + 0.7 * _draw(*keys, number.astype(np.int64))) * size
    before = t < start
    neighbour = np.where(before, number - 1, number + 1)
    bound = (neighbour + 0.7 * _draw(*keys, neighbour.astype(np.int64))) * size
    number = (number - before).astype(np.int64)
    return number, np.where(before, bound, start), np.where(before, start, bound)


def _share(t: Array, start: Array, end: Array, count: Array) -> tuple[Array, Array, Array]:
    """Divide pieces of a line evenly."""
    width = (end - start) / count
    number = np.clip(np.floor((t - start) / width), 0, count - 1)
    return number.astype(np.int64), start + number * width, start + (number + 1) * width


class _Block(NamedTuple):
    """Rectangles between parallel rows of straight ways."""

    key: Array
    row: Array
    u0: Array
    u1: Array
    v0: Array
    v1: Array


def _blocks(u: Array, v: Array, length: Array, width: Array, key: Array) -> _Block:
    row, v0, v1 = _cut(v, width, key, "row")
    strip = _hash(key, row)
    col, u0, u1 = _cut(u, length, strip, "column")
    return _Block(key=_hash(strip, col), row=row, u0=u0, u1=u1, v0=v0, v1=v1)


def _line(distance: Array, half_width: Array | float, step: float) -> Array:
    """Give the share of samples of size `step` that a line of some width covers, by their distance from its middle."""
    inside = np.minimum(half_width, distance + step / 2) - np.maximum(-half_width, distance - step / 2)
    return np.clip(inside / step, 0, 1).astype(np.float32)


def _smooth(t: Array, low: float, high: float) -> Array:
    f = np.clip((t - low) / np.float32(high - low), 0, 1)
    return f * f * (3 - 2 * f)


def _slope(field: Array, step: float) -> tuple[Array, Array]:
    """Differentiate eastwards and northwards; the outermost samples are left at zero."""
    east, north = np.zeros_like(field), np.zeros_like(field)
    east[:, 1:-1] = (field[:, 2:] - field[:, :-2]) / (2 * step)
    north[1:-1] = (field[:-2] - field[2:]) / (2 * step)
    return east, north


def _from_line(grid: _Grid, weights: dict[float, float], *keys: Array | int | str) -> Array:
    """Give the distance in metres from the winding lines along which noise is zero."""
    # Differences between near pixels are far below float32's precision.
    field = _octaves(grid.x, grid.y, weights, *keys, dtype=np.float64)
    east, north = _slope(field, grid.step)
    distance: Array = np.abs(field) / np.sqrt(np.maximum(east * east + north * north, 1e-8))
    return distance.astype(np.float32)


class _Site(NamedTuple):
    """One point of a jittered lattice: a town, a lake, a pit."""

    key: Array
    col: int
    row: int
    x: float
    y: float


def _sites(x: Array, y: Array, size: float, reach: float, *keys: Array | int | str) -> Iterator[_Site]:
    """List the sites of a jittered lattice that lie within `reach` metres of a window, in a fixed order."""
    for row in range(math.floor((y.min() - reach) / size), math.floor((y.max() + reach) / size) + 1):
        for col in range(math.floor((x.min() - reach) / size), math.floor((x.max() + reach) / size) + 1):
            key = _hash(*keys, col, row)
            along, aside = (0.15 + 0.7 * float(_draw(key, axis)) for axis in "xy")
            yield _Site(key, col, row, (col + along) * size, (row + aside) * size)


def _span(t: Array, low: float, high: float) -> slice:
    """Find the samples of a monotonous axis between two coordinates."""
    inside = np.flatnonzero((t >= low) & (t <= high))
    return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0)


class _Canvas:
    """The ground while it is being painted."""

    def __init__(self, seed: int, grid: _Grid) -> None:
        self.seed, self.x, self.y, self.step = seed, grid.x, grid.y, grid.step
        shape = (len(grid.y), len(grid.x))
        self.kind = np.empty(shape, np.uint8)
        self.key = np.empty(shape, np.uint64)
        # Share of the ground under trees outside forests.
        self.trees = np.zeros(shape, np.float32)
        self.height = np.zeros(shape, np.float32)
        self.vigour = np.zeros(shape, np.float32)
        self.shade = np.ones(shape, np.float32)
        self.district = np.empty(shape, np.uint64)
        self.lake = np.zeros(shape, bool)
        # Water, marsh and bare ground; roads and roofs, where no tree grows.
        self.wild = np.zeros(shape, bool)
        self.built = np.zeros(shape, bool)
        self.layers: list[_Layer] = []

    def lay(self, cover: Array, name: str, variant: Array, window: tuple[slice, slice] | None = None) -> None:
        """Lay a partly covering surface over a window (or all): nothing lies on lakes, few things on wild land."""
        away = self.wild if name in ("track", "margin") else self.lake
        where = np.flatnonzero((cover > 0.02) & ~away[window or ...])
        row = _COVERS.index(name) * _VARIANTS + np.broadcast_to(variant, cover.shape).ravel()[where] % _VARIANTS
        covered = cover.ravel()[where]
        if window is not None:
            rows, cols = np.divmod(where, cover.shape[1])
            where = (rows + window[0].start) * len(self.x) + cols + window[1].start
        self.layers.append(_Layer(where, covered, row.astype(np.intp)))
        if name not in ("margin", "tree"):
            self.built.ravel()[where] |= covered > 0.3


def _paint_country(canvas: _Canvas, relief: Array, river: Array, stream: Array) -> None:
    """Paint fields, meadows and forests, with the ways between them."""
    x, y, step, seed = canvas.x, canvas.y, canvas.step, canvas.seed
    district = _voronoi(x, y, 1900, seed, "district")
    bend = np.float32(35) * _noise(x, y, 2300, seed, "bend")
    u, v, key = district.u - bend, district.v + bend, district.key
    canvas.district[:] = key
    block = _blocks(u, v, 260 + 420 * district.draw("length"), 170 + 260 * district.draw("width"), key)
    across = _draw(block.key, "across") < 0.3
    t = np.where(across, u, v)
    start, end = np.where(across, block.u0, block.v0), np.where(across, block.u1, block.v1)
    wanted = 38 + 190 * _draw(block.key, "wanted") * district.draw("strips")
    number, low, high = _share(t, start, end, np.maximum(1, np.floor((end - start) / wanted)))
    parcel = _hash(block.key, number)

    # Crops come by chance, with a taste of the district; wet ground and hills are grass.
    pasture = 0.1 + 0.25 * _smooth(_noise(*district.centres, 9000, seed, "pasture"), -0.3, 2).ravel()[district.cell]
    chance = (_draw(parcel, "crop") - pasture) / (1 - pasture)
    canvas.kind[:] = _KIND["grassland"]
    for name, least in (("wheat", 0.0), ("rapeseed", 0.34), ("maize", 0.51), ("alfalfa", 0.81)):
        canvas.kind[chance >= least] = _KIND[name]
    flood = river < 160 + 90 * _noise(x, y, 700, seed, "flood")
    high_ground = relief + 0.35 * _draw(block.key, "hill") > 0.95
    canvas.kind[(flood & (_draw(parcel, "flooded") < 0.8)) | high_ground] = _KIND["grassland"]
    canvas.key[:] = parcel

    # Forest grows on hills; its border follows parcels here and its own will there.
    wood = _octaves(x, y, {3200: 1, 1300: 0.55, 480: 0.3, 160: 0.12, 50: 0.05}, seed, "forest")
    forest = wood + 2.2 * (relief - 0.42) + 0.9 * (_draw(parcel, "wood") - 0.5) > 0.62
    forest &= river > 60
    needles = (
        _octaves(x, y, {2600: 1, 800: 0.6, 200: 0.3}, seed, "needles")
        + 1.1 * (relief - 0.45)
        + 1.2 * (_draw(block.key, "planted") - 0.5)
        > 0.1
    )
    canvas.kind[forest] = np.where(needles, _KIND["conifer"], _KIND["broadleaf"])[forest]
    clearing = forest & (_draw(parcel, "felled") < 0.035)
    canvas.kind[clearing] = _KIND["grassland"]

    # Machines work along the strips; one pass differs a little from the next.
    passes = _draw(parcel, "pass", np.floor(np.where(across, u, v) / 21).astype(np.int64)) - 0.5
    canvas.vigour += np.where(canvas.kind == _KIND["grassland"], 0.25, 0.55) * passes * ~forest
    if step < 3:
        _paint_rows(canvas, t - low, parcel, forest)

    # Ways and hedges lie on borders: which ones is the border's own secret, so that both sides agree.
    along = np.minimum(v - block.v0, block.v1 - v)
    border = _hash(key, block.row + (block.v1 - v < v - block.v0), "border")
    fate = _draw(border, "fate")
    canvas.lay(_line(np.minimum(t - low, high - t), 0.9, step) * ~forest, "margin", parcel)
    way = np.where(fate < 0.45, 1.8, 0.0)
    canvas.lay(_line(along, way, step), "track", border)
    hedged = district.draw("hedges") * 0.45
    canvas.trees = np.maximum(
        canvas.trees, _line(along - 4, np.where((fate > 0.5) & (fate < 0.5 + hedged), 3.5, 0), step)
    )
    ends = np.minimum(u - block.u0, block.u1 - u)
    canvas.lay(_line(ends, np.where(district.draw("ends") < 0.6, 1.6, 0), step), "track", block.row)
    main = _draw(district.pair, "main")
    canvas.lay(_line(district.edge, np.where(main < 0.55, 2.8, 0), step), "road", district.pair)
    canvas.lay(_line(district.edge, np.where(main < 0.55, 0, 2.2), step), "track", district.pair)
    canvas.trees = np.maximum(canvas.trees, _line(district.edge - 8, np.where(main < 0.2, 3.5, 0), step))
    canvas.trees = np.maximum(canvas.trees, 0.9 * _line(stream - 11, 7.0, step))
    canvas.trees[forest] = 0


def _paint_rows(canvas: _Canvas, t: Array, parcel: Array, forest: Array) -> None:
    """Add what only a camera close by sees of a field: wheel tracks, mowing, rows."""
    step = canvas.step
    width = 15 + 12 * _draw(parcel, "boom")
    offset = np.abs(np.mod(t, width) - width / 2)
    wheels = np.maximum(_line(offset - 0.9, 0.25, step), _line(offset + 0.9, 0.25, step))
    tilled = (canvas.kind >= _KIND["wheat"]) & (canvas.kind <= _KIND["maize"])
    canvas.vigour -= np.float32(2.5) * wheels * tilled
    swath = np.floor(t / 3).astype(np.int64)
    canvas.vigour += (_draw(parcel, "swath", swath) - 0.5) * np.float32(0.9) * (~tilled & ~forest)
    if step < 0.5:
        row = np.where(canvas.kind == _KIND["maize"], 1.5, 0.9)
        canvas.vigour += np.float32(0.5) * np.cos(t * (2 * np.pi / row)).astype(np.float32) * tilled


class _Wet(NamedTuple):
    """Where water and what it leaves lies, bool [H, W]."""

    marsh: Array
    bare: Array
    water: Array
    owner: Array
    """uint64 [H, W], the number of the lake or river."""


def _find_water(canvas: _Canvas, relief: Array, river: Array, stream: Array) -> _Wet:
    """Find rivers, lakes, wet land, gravel banks, pits and rock."""
    x, y, seed = canvas.x, canvas.y, canvas.seed
    wander = _noise(x, y, 900, seed, "wander")
    ragged = wander + 0.6 * _noise(x, y, 170, seed, "ragged") + 0.25 * _noise(x, y, 45, seed, "ragged")
    half = 27 + 9 * wander
    lake = np.full(canvas.kind.shape, 1e6, np.float32)
    pit, owner = lake.copy(), np.full(canvas.kind.shape, _hash(seed, "river"))
    for target, size, odds, least, most, name in (
        (lake, 5200.0, 0.62, 130, 560, "lake"),
        (pit, 3100.0, 0.6, 80, 230, "pit"),
    ):
        for site in _sites(x, y, size, 1200, seed, name):
            if float(_draw(site.key, "odds")) > odds:
                continue
            radius = least + (most - least) * float(_draw(site.key, "radius")) ** 2
            rows, cols = _span(y, site.y - 1200, site.y + 1200), _span(x, site.x - 1200, site.x + 1200)
            away = np.hypot((x[cols] - site.x), 1.4 * (y[rows, None] - site.y)).astype(np.float32)
            away += (0.22 * radius + 6) * ragged[rows, cols] - radius
            np.copyto(owner[rows, cols], site.key, where=away < 0)
            np.minimum(target[rows, cols], away, out=target[rows, cols])
    lake = np.where(relief < 0.62, lake, 1e6)
    wet = np.minimum(lake, river - half)
    marsh = (wet < 45 + 55 * ragged) & (_noise(x, y, 1500, seed, "marsh") > 0.15)
    marsh |= (stream < 14 + 9 * ragged) & (relief < 0.3) & (_noise(x, y, 2600, seed, "fen") > 0.9)
    bare = (pit < 0) | ((river - half < 6 + 13 * ragged) & (ragged > 0.75)) | (relief + 0.08 * ragged > 1.3)
    pond = pit < -26 - 12 * ragged
    water = (wet < 0) | pond
    canvas.lake |= (lake < 0) | pond
    canvas.wild |= marsh | bare | water
    return _Wet(marsh=marsh, bare=bare, water=water, owner=owner)


def _paint_water(canvas: _Canvas, wet: _Wet, stream: Array) -> None:
    one, other = (np.floor(_noise(canvas.x, canvas.y, size, canvas.seed, "patch")) for size in (420, 260))
    patch = _hash(canvas.district, one.astype(np.int64), other.astype(np.int64))
    for mask, name, key in (
        (wet.marsh, "wetland", patch),
        (wet.bare, "bare", patch),
        (wet.water, "water", wet.owner),
    ):
        canvas.kind[mask] = _KIND[name]
        canvas.key[mask] = key[mask]
        canvas.trees[mask] = 0
        canvas.vigour[mask] = 0
    canvas.lay(_line(stream, 2.2, canvas.step), "stream", np.zeros(1, np.uint64))


def _paint_roads(canvas: _Canvas) -> None:
    """Join the towns by roads that bend gently."""
    x, y, step, seed = canvas.x, canvas.y, canvas.step, canvas.seed
    towns = {(site.col, site.row): site for site in _sites(x, y, _TOWN_SPACING, 2.5 * _TOWN_SPACING, seed, "town")}
    for (col, row), a in towns.items():
        for i, j in ((1, 0), (0, 1), (1, 1), (1, -1)):
            b = towns.get((col + i, row + j))
            link = _hash(a.key, i, j)
            if b is None or float(_draw(link, "odds")) > (0.8 if i * j == 0 else 0.2):
                continue
            length = math.hypot(b.x - a.x, b.y - a.y)
            east, north = (b.x - a.x) / length, (b.y - a.y) / length
            sway = [(float(_draw(link, n)) - 0.5) * 0.16 * length / n for n in (1, 2, 3)]
            reach = sum(map(abs, sway)) + 60
            rows = _span(y, min(a.y, b.y) - reach, max(a.y, b.y) + reach)
            cols = _span(x, min(a.x, b.x) - reach, max(a.x, b.x) + reach)
            if rows.stop == rows.start or cols.stop == cols.start:
                continue
            dx, dy = (x[cols] - a.x).astype(np.float32), (y[rows, None] - a.y).astype(np.float32)
            along, aside = (dx * east + dy * north) / length, dy * east - dx * north
            bend, lean = np.zeros_like(along), np.zeros_like(along)
            for n, size in enumerate(sway, start=1):
                bend += size * np.sin(n * math.pi * along)
                lean += size * n * math.pi / length * np.cos(n * math.pi * along)
            away = np.abs(aside - bend) / np.sqrt(1 + lean * lean)
            away[(along < 0) | (along > 1)] = 1e6
            canvas.lay(_line(away, 3.6 + 2.4 * float(_draw(link, "width")), step), "road", link, (rows, cols))
            if float(_draw(link, "avenue")) < 0.5:
                canvas.trees[rows, cols] = np.maximum(canvas.trees[rows, cols], 0.8 * _line(away - 11, 4.0, step))


def _paint_towns(canvas: _Canvas) -> None:
    """Paint towns: quarters with their own street grid, lots, houses and gardens."""
    x, y, step, seed = canvas.x, canvas.y, canvas.step, canvas.seed
    for site in _sites(x, y, _TOWN_SPACING, 2300, seed, "town"):
        hill = float(_noise(np.array([site.x]), np.array([site.y]), 9000, seed, "hills", 9000)[0, 0])
        radius = 170 + (1100 if hill < 0.5 else 200) * float(_draw(site.key, "radius")) ** 2.2
        rows = _span(y, site.y - 1.7 * radius, site.y + 1.7 * radius)
        cols = _span(x, site.x - 1.7 * radius, site.x + 1.7 * radius)
        if rows.stop == rows.start or cols.stop == cols.start:
            continue
        quarter = _voronoi(x[cols], y[rows], 620, site.key, "quarter")
        middle = np.hypot(quarter.centres[0] - site.x, quarter.centres[1][:, None] - site.y).ravel()[quarter.cell]
        core = (middle < 0.45 * radius) & (radius > 450)
        works = (quarter.draw("works") < 0.2) & (radius > 450) & ~core
        length = np.where(works, 190, 125).astype(np.float32) - np.float32(40) * core
        block = _blocks(quarter.u, quarter.v, length, np.where(works, 150, 78).astype(np.float32), quarter.key)
        # A lot belongs to the town or not as a whole: its middle and its block decide.
        u, v = quarter.u, quarter.v
        wide = np.where(works, 45 + 50 * _draw(block.key, "hall"), 17 + 9 * quarter.draw("lot"))
        i, u0, u1 = _share(u, block.u0, block.u1, np.maximum(1, np.rint((block.u1 - block.u0) / wide)))
        deep = np.where(works, 80, 36).astype(np.float32)
        j, v0, v1 = _share(v, block.v0, block.v1, np.maximum(1, np.rint((block.v1 - block.v0) / deep)))
        lot = _hash(block.key, i, j)
        to_u, to_v = (u0 + u1) / 2 - u, (v0 + v1) / 2 - v
        dx = (x[cols] - site.x).astype(np.float32) + to_u * quarter.cos - to_v * quarter.sin
        dy = (y[rows, None] - site.y).astype(np.float32) + to_u * quarter.sin + to_v * quarter.cos
        bearing, lobes = np.arctan2(dy, dx), 6.3 * float(_draw(site.key, "lobes"))
        outline = radius * (1 + 0.22 * np.cos(2 * bearing + lobes) + 0.16 * np.cos(3 * bearing - 2 * lobes))
        away = np.hypot(dx, dy) / outline + 0.3 * (_draw(block.key, "edge") - 0.5) + 0.15 * (_draw(lot, "edge") - 0.5)
        urban = (away < 1) & ~canvas.wild[rows, cols]
        if not urban.any():
            continue
        park = urban & ~works & (_draw(block.key, "park") < 0.07)

        kind, key, trees, height = (
            layer[rows, cols] for layer in (canvas.kind, canvas.key, canvas.trees, canvas.height)
        )
        paved = works | (_draw(lot, "paved") < np.where(core, 0.75, 0.1))
        kind[urban] = np.where(park, _KIND["grassland"], np.where(paved, _KIND["yard"], _KIND["garden"]))[urban]
        key[urban] = np.where(park, block.key, lot)[urban]
        leafy = np.where(park, 0.55, np.where(paved, 0.04, 0.12 + 0.3 * _draw(lot, "leafy"))).astype(np.float32)
        trees[urban] = leafy[urban]

        window = (rows, cols)
        street = np.minimum(np.minimum(u - block.u0, block.u1 - u), np.minimum(v - block.v0, block.v1 - v))
        street = np.minimum(street, quarter.edge - 1)
        street_cover = _line(street, np.where(works, 5.0, 3.9), step) * urban
        trees *= 1 - street_cover
        canvas.lay(street_cover, "road", block.row, window)

        # Houses stand back from the street, halls fill their lot, old centres are closed rows.
        r, q = _draw(lot, "house"), _draw(lot, "depth")
        side = np.where(core, -0.5, np.where(works, 6.0, 2.2 + 2 * r))
        front = np.where(core, 4.5, np.where(works, 9.0, 7.0 + 3 * q))
        back = np.where(works, 7.0, np.maximum(4.0, (v1 - v0) - front - (9.5 + 4 * r)))
        facing = np.where(j == 0, v - v0, v1 - v)
        behind = np.where(j == 0, v1 - v, v - v0)
        inside = np.minimum(np.minimum(u - u0, u1 - u) - side, np.minimum(facing - front, behind - back))
        inside = np.minimum(inside, street - 4.5)
        roof = np.clip(0.5 + inside / step, 0, 1).astype(np.float32)
        roof *= urban & ~park & (_draw(lot, "empty") > np.where(works, 0.25, 0.08))
        trees *= 1 - roof
        storeys = np.where(core, 12.0, np.where(works, 9.0, 6.5)).astype(np.float32) * (0.8 + 0.5 * r)
        tint = _draw(lot, "roof")
        metal = works & (tint < 0.45)
        tiled = ~works & (tint < 0.68)
        for name, mask in (("metal roof", metal), ("tile roof", tiled), ("slate roof", ~metal & ~tiled)):
            canvas.lay(roof * mask, name, lot, window)
        ridge = np.clip(np.minimum(facing - front, behind - back), 0, 6).astype(np.float32)
        gable = np.where(works, 0.3, np.where(step < 3, 0.6 * ridge, 1.5))
        np.copyto(height, (storeys + gable) * roof, where=roof > 0.3)


def _paint_trees(canvas: _Canvas) -> None:
    """Let trees stand: single crowns where pixels show them, else their share of a pixel."""
    x, y, step, seed = canvas.x, canvas.y, canvas.step, canvas.seed
    forest = (canvas.kind == _KIND["broadleaf"]) | (canvas.kind == _KIND["conifer"])
    tall = np.where(canvas.kind == _KIND["conifer"], 25.0, 21.0).astype(np.float32) * (
        0.45 + 0.6 * _draw(canvas.key, "age")
    )
    if step > 2.6:
        cover = canvas.trees * np.clip(0.85 + 0.3 * _noise(x, y, 35, seed, "crowns"), 0, 1)
        canvas.lay(cover, "tree", np.zeros(1, np.uint64))
        canvas.height = np.where(forest, tall, np.maximum(canvas.height, 9 * cover))
        return
    size = 6.0
    col, row = np.floor(x / size), np.floor(y / size)
    cols, rows = np.arange(col.min() - 1, col.max() + 2), np.arange(row.min() - 1, row.max() + 2)
    key = _hash(seed, "crown", rows[:, None].astype(np.int64), cols.astype(np.int64))
    centre_x, centre_y = (0.1 + 0.8 * _draw(key, "x")) * size, (0.1 + 0.8 * _draw(key, "y")) * size
    # A tree is what the ground at its foot says, wherever its crown reaches.
    foot_col = np.floor((cols * size + centre_x) / step) - np.floor(x[0] / step)
    foot_row = np.floor(y[0] / step) - np.floor((rows[:, None] * size + centre_y) / step)
    foot = np.clip(foot_row, 0, len(y) - 1).astype(np.intp), np.clip(foot_col, 0, len(x) - 1).astype(np.intp)
    wooded = forest[foot]
    stem = np.where(wooded, tall[foot] - 5, 4).astype(np.float32)
    spread = 2.2 + 2.6 * _draw(key, "spread")
    wanted = np.where(wooded, 1.0, canvas.trees[foot]) * ~canvas.built[foot]
    spread[_draw(key, "chance") >= wanted] = 1e-3
    in_x, in_y = (x - col * size).astype(np.float32), (y - row * size).astype(np.float32)[:, None]
    base = (row - rows[0]).astype(np.intp)[:, None] * len(cols) + (col - cols[0]).astype(np.intp)
    dome = np.zeros(base.shape, np.float32)
    owner = base.copy()
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            at = base + (i * len(cols) + j)
            dx = in_x - (centre_x.take(at) + np.float32(j * size))
            dy = in_y - (centre_y.take(at) + np.float32(i * size))
            wide = spread.take(at)
            high = wide - (dx * dx + dy * dy) / wide
            taller = high > dome
            np.copyto(dome, high, where=taller)
            np.copyto(owner, at, where=taller)
    crown = np.clip(dome / np.float32(max(step, 0.3)), 0, 1)
    leaves = _octaves(x, y, {2.2: 1, 0.8: 0.8}, seed, "leaves")
    canvas.lay(np.where(forest & ~canvas.built, 0, crown).astype(np.float32), "tree", key.take(owner))
    pointed = np.where(canvas.kind == _KIND["conifer"], 2.4, 1.3).astype(np.float32)
    canvas.height = np.maximum(canvas.height, (stem.take(owner) + pointed * dome + 0.25 * leaves) * (crown > 0.4))
    bright = (0.82 + 0.36 * _draw(key, "bright")).take(owner) + np.float32(0.08) * leaves
    canvas.shade *= np.where(crown > 0, bright, np.where(forest & ~canvas.built, np.float32(0.55), np.float32(1)))


def _cast(height: Array, step: float) -> Array:
    """Give the light that trees and houses leave: their sunny sides are brighter, their shadows dark."""
    east, north = math.sin(_SHADOW_AZIMUTH), math.cos(_SHADOW_AZIMUTH)
    rows, cols = height.shape
    light = np.ones_like(height)
    blocked = np.full_like(height, -1e6)
    stride = max(step, 0.4)
    for n in range(1, math.ceil(_SHADOW_REACH / stride) + 1):
        down, right = round(-north * n * stride / step), round(east * n * stride / step)
        if down >= rows or right >= cols:
            break
        lower = height[down:, right:] - np.float32(n * stride * _SHADOW_SLOPE)
        target = blocked[: rows - down, : cols - right]
        np.maximum(target, lower, out=target)
        if n == 1:
            rise = height[: rows - down, : cols - right] - height[down:, right:]
            light[: rows - down, : cols - right] += np.clip(rise * np.float32(0.3 / stride), -0.35, 0.35)
    return light * (1 - np.float32(0.62) * np.clip((blocked - height) / np.float32(1.2 + 0.6 * step), 0, 1))


# The year: what grows on a date.


class _Season(NamedTuple):
    """Shares of each stand's ground on a date, float32 [n], and what soil it has."""

    green: Array
    dry: Array
    bloom: Array
    bare: Array
    soil: Array
    """Brightness of its soil."""
    moisture: float
    """0 dry, 1 soaked; the same everywhere, as the last rain was."""


def _weather(seed: int, day: int, *keys: str, days: float) -> float:
    """Give a number around 0 that changes over some days."""
    return float(_noise(np.array([float(day)]), np.zeros(1), days, seed, "weather", *keys)[0, 0])


@cache
def _parse_calendar(text: str) -> tuple[Array, Array]:
    """Turn a calendar into days [n] and shares [3, n] of green, dry and blooming."""
    knots = [knot.split(":") for knot in text.split()]
    values = [[float(part) / 100 for part in shares.split("+")] for _, shares in knots]
    return np.array([float(day) for day, _ in knots]), np.array([v + [0.0] * (3 - len(v)) for v in values]).T


def _season(ground: Ground, seed: int, day: int) -> _Season:
    date = to_date(day)
    shares = np.zeros((3, len(ground.kind)), np.float32)
    shift = 4 * _weather(seed, day, "spring", days=200.0) + 30 * (_draw(ground.key, "late") - 0.5)
    shift = shift + 16 * (_draw(ground.key, "late", date.year) - 0.5)
    for number, surface in enumerate(SURFACES.values()):
        mine = np.flatnonzero(ground.kind == number)
        choice = (_draw(ground.key[mine], "calendar") * len(surface.years)).astype(np.intp)
        when = date.timetuple().tm_yday - shift[mine] * surface.spread
        for n, calendar in enumerate(surface.years):
            followers = choice == n
            days, values = _parse_calendar(calendar)
            for share, value in zip(shares, values, strict=True):
                share[mine[followers]] = np.interp(when[followers], days, value, period=365)
    fallow = np.array([s.ground == "loam" for s in SURFACES.values()])[ground.kind]
    lush = 1.07 - np.where(fallow, 0.42, 0.2) * _draw(ground.key, "lush")
    green, dry, bloom = np.clip(shares[0] * lush, 0, 0.98), shares[1], shares[2]
    return _Season(
        green=green,
        dry=dry,
        bloom=bloom,
        bare=np.clip(1 - green - dry - bloom, 0, 1),
        soil=0.62 + 0.6 * _draw(ground.key, "soil"),
        moisture=min(1.0, max(0.0, 0.45 + 0.3 * _weather(seed, day, "rain", days=9.0))),
    )


class _Sun(NamedTuple):
    east: float
    north: float
    up: float


def _sun(day: int, hour: float) -> _Sun:
    """Point at the sun at a solar time."""
    year = 2 * math.pi * (to_date(day).timetuple().tm_yday - 81) / 365
    declination, latitude = math.radians(23.44) * math.sin(year), math.radians(LATITUDE)
    angle = math.radians(15 * (hour - 12))
    return _Sun(
        east=-math.cos(declination) * math.sin(angle),
        north=math.sin(declination) * math.cos(latitude) - math.cos(declination) * math.sin(latitude) * math.cos(angle),
        up=math.sin(declination) * math.sin(latitude) + math.cos(declination) * math.cos(latitude) * math.cos(angle),
    )


# The sensors.


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
_MAPS = ("srtm", "worldcover", "wri_canopy_height_map")


def _atmosphere(wavelength: float, haze: float) -> tuple[float, float]:
    """Give the reflectance of the air and its transmission, down and up: about those of a clear to hazy summer day."""
    thin = (0.443 / wavelength) ** 3.7 * 0.095 + haze * (0.443 / wavelength) ** 1.3 * 0.022
    gas = np.interp(wavelength, (0.9, 0.945, 0.98, 1.34, 1.375, 1.41), (1, 0.62, 1, 1, 0.004, 1))
    return thin * float(min(1.0, gas + 0.1)), math.exp(-1.9 * thin - 0.03) * float(gas)


class _Clouds(NamedTuple):
    """Opacity of clouds, how thick they are and how deep their shadows, float32 [H, W] in 0 to 1."""

    cover: Array
    bulk: Array
    shadow: Array


def _thickness(x: Array, y: Array, share: float, *keys: int | str) -> Array:
    """Give the thickness of clouds, 0 where there are none, such that they cover the share of a wide country."""
    thick = _octaves(x, y, {6500: 1, 2700: 0.65, 1150: 0.45, 480: 0.3, 200: 0.2, 85: 0.12}, *keys)
    return np.clip(thick - np.float32(NormalDist().inv_cdf(1 - min(share, 0.999))), 0, None)


def _blend(field: Array, size: int) -> Array:
    """Average blocks of size x size."""
    total = field[::size, ::size].copy()
    for i in range(size):
        for j in range(size):
            if i or j:
                total += field[i::size, j::size]
    return total / np.float32(size * size)


def _blur(field: Array) -> Array:
    """Spread each pixel a little into its neighbours, as optics do; the outermost stay."""
    wide = field.copy()
    wide[:, 1:-1] = 0.76 * field[:, 1:-1] + 0.12 * (field[:, :-2] + field[:, 2:])
    field = wide.copy()
    field[1:-1] = 0.76 * wide[1:-1] + 0.12 * (wide[:-2] + wide[2:])
    return field


@dataclass(frozen=True, slots=True)
class Planet:
    """A planet with known truth, the same for everybody who knows its seed."""

    seed: int = 0
    clouds: float = 0.12
    """Share of the ground under clouds, over many dates: most are nearly clear and some are not."""

    def __post_init__(self) -> None:
        if not 0 <= self.clouds < 1:
            raise InputError(f"clouds={self.clouds} came; wanted a share from 0 to below 1")

    def ground(self, box: GeoBox) -> Ground:
        """Work out what lies where: the costly part, to be shared by the dates and sensors of a box."""
        grid, seed = _grid(box), self.seed
        x, y, step = grid.x, grid.y, grid.step
        river = _from_line(grid, {11000: 1, 3600: 0.34, 1400: 0.1, 600: 0.02}, seed, "river")
        stream = _from_line(grid, {4200: 1, 1500: 0.3, 520: 0.07, 190: 0.012}, seed, "stream")
        valley = river / (river + 1000)
        hills = _octaves(x, y, {9000: 1, 3600: 0.45, 1500: 0.2, 600: 0.08, 250: 0.03}, seed, "hills")
        rolling = 0.62 + 0.42 * hills
        relief = 0.5 * (rolling + np.sqrt(rolling * rolling + np.float32(0.04))) * valley
        elevation = 240 + 30 * _noise(x, y, 40000, seed, "plain") + 430 * relief
        elevation += valley * 3 * _octaves(x, y, {400: 1, 130: 0.4, 40: 0.12}, seed, "bumps") + 4 * _smooth(
            stream, 0, 60
        )
        east, north = _slope(elevation, step)

        canvas = _Canvas(seed, grid)
        wet = _find_water(canvas, relief, river, stream)
        _paint_country(canvas, relief, river, stream)
        _paint_water(canvas, wet, stream)
        _paint_roads(canvas)
        _paint_towns(canvas)
        _paint_trees(canvas)

        texture = np.array([surface.texture for surface in SURFACES.values()], np.float32)
        speck = _normal(_index(x, step), _index(y, step), seed, "texture") * np.float32(min(1, 0.2 + step / 12))
        canvas.shade *= 1 + texture.take(canvas.kind) * (
            0.75 * speck + 0.8 * _noise(x, y, max(45.0, 3 * step), seed, "texture")
        )
        canvas.shade *= _cast(canvas.height, step)
        canvas.vigour += (
            0.9 * _octaves(x, y, {420: 1, 140: 0.7, 50: 0.45, 16: 0.35, 5: 0.3, 1.6: 0.3}, seed, "vigour")
            + 0.18 * speck
        )
        damp = _octaves(x, y, {600: 1, 230: 0.8, 90: 0.5, 30: 0.25}, seed, "wet")

        # Tables: stands of this window, then the surfaces that lie over others.
        keys, first, stand = np.unique(_hash(canvas.key, canvas.kind), return_index=True, return_inverse=True)
        covers = np.repeat([_KIND[name] for name in _COVERS], _VARIANTS)
        cover_keys = _hash(seed, "cover", np.arange(len(covers)))
        layers = tuple(_Layer(layer.where, layer.cover, layer.row + len(keys)) for layer in canvas.layers)
        codes = np.array([surface.code for surface in SURFACES.values()], np.uint8)
        kind = np.concatenate([canvas.kind.ravel()[first].astype(np.intp), covers])
        code = codes.take(canvas.kind)
        for layer in layers:
            name = kind[layer.row]
            seen = (layer.cover > 0.5) & np.isin(name, [_KIND["road"], _KIND["tree"], _KIND["stream"]])
            flat, where = code.ravel(), layer.where[seen]
            flat[where] = np.where(flat[where] == codes[_KIND["road"]], flat[where], codes[name[seen]])
        return Ground(
            seed=seed,
            box=box,
            grid=grid,
            stand=stand.reshape(canvas.key.shape),
            kind=kind,
            key=np.concatenate([keys, cover_keys]),
            layers=layers,
            vigour=canvas.vigour,
            wet=damp,
            elevation=elevation,
            east=east,
            north=north,
            shade=canvas.shade,
            height=canvas.height,
            code=code,
        )

    def truth(self, where: GeoBox | Ground) -> Array:
        """Give the class codes uint8 [H, W], the commonest in each pixel. Crops keep to their fields over the years."""
        ground = self._as_ground(where)
        size = ground.grid.per_pixel
        if size == 1:
            return _crop(ground, ground.code)
        counts = np.stack([_blend((ground.code == c.code).astype(np.float32), size) for c in CLASSES])
        return _crop(ground, np.array([c.code for c in CLASSES], np.uint8)[counts.argmax(axis=0)], blended=True)

    def observe(self, modality: str, where: GeoBox | Ground, date: dt.date | str) -> tuple[Array, Array]:
        """Look at a box on a date: float32 [C, H, W] in the modality's declared unit and bool [H, W], True where data.

        A band coarser than the box's pixels shows blocks of 1, 2, 3 or 6 of them, the most that its GSD holds.
        """
        sensor = SENSORS.get(modality)
        if sensor is None and modality not in _MAPS:
            raise InputError(f"the planet shows no {modality!r}; it has {', '.join((*SENSORS, *_MAPS))}")
        ground, day = self._as_ground(where), to_days(date)
        if isinstance(sensor, Optics):
            return self._photograph(modality, sensor, ground, day)
        pixels = self._survey(modality, ground) if sensor is None else self._listen(sensor, ground, day)
        return pixels, np.ones(pixels.shape[1:], bool)

    def _as_ground(self, where: GeoBox | Ground) -> Ground:
        if not isinstance(where, Ground):
            return self.ground(where)
        if where.seed != self.seed:
            raise InputError(f"the ground of planet {where.seed} came; wanted that of planet {self.seed}: make it anew")
        return where

    def _photograph(self, modality: str, sensor: Optics, ground: Ground, day: int) -> tuple[Array, Array]:
        bands = MODALITIES[modality].bands
        grid = ground.grid
        sun = _sun(day, sensor.hour)
        season = _season(ground, self.seed, day)
        clouds = None if sensor.under_clouds else self._clouds(grid, sun, day)
        light = _illumination(ground, sun)
        if clouds is not None:
            light *= 1 - np.float32(0.62) * clouds.shadow
        haze = 1 + 0.8 * _weather(self.seed, day, "haze", days=3.0)
        scales, offsets = np.broadcast_to(sensor.scale, len(bands)), np.broadcast_to(sensor.offset, len(bands))
        ys, xs = (_index(t[:: grid.per_pixel], grid.step * grid.per_pixel) for t in (grid.y, grid.x))
        out = np.empty((len(bands), ground.box.height, ground.box.width), np.float32)
        for n, band in enumerate(bands):
            wavelength = band.wavelength
            assert wavelength is not None, f"{modality} {band.name} is no colour"
            thermal = wavelength > 3
            if thermal:
                field = _compose(ground, _kelvin(ground, season, wavelength, self.seed, day))
                field += np.float32(5) * (light - 1) - np.float32(0.006) * (ground.elevation - 240)
            else:
                field = _compose(ground, _reflectance(ground, season, wavelength))
                diffuse = np.float32(1 - 0.25 * (0.45 / wavelength) ** 2)
                field *= 1 + diffuse * (light - 1)
            if clouds is not None:
                # Thick clouds are whiter, and colder.
                top = 278 - 20 * clouds.cover if thermal else _spectrum("cloud", wavelength) * (0.6 + 0.4 * clouds.bulk)
                field += clouds.cover * (top - field)
            # From here on a field has one value per cell of the instrument.
            cell = _cell(grid, band)
            field = _blend(field, grid.per_pixel)
            field = _blur(field) if cell == 1 else _blend(field, cell)
            grain = _normal(xs[::cell] // cell, ys[::cell] // cell, self.seed, modality, band.name, day)
            if thermal:
                pixels = _radiance_counts(field + np.float32(0.08) * grain, band)
            else:
                if sensor.through_air:
                    path, clear = _atmosphere(wavelength, max(haze, 0.0))
                    field = np.float32(path) + np.float32(clear) * field
                if sensor.low_sun:
                    field *= np.float32(sun.up)
                field += np.float32(sensor.noise) * (field + np.float32(0.1)) * grain
                if sensor.curve != 1:
                    field = np.maximum(field, 0) ** np.float32(sensor.curve)
                pixels = np.float32(scales[n]) * field + np.float32(offsets[n])
            if cell > 1:
                pixels = pixels.repeat(cell, axis=0).repeat(cell, axis=1)
            out[n] = np.clip(_crop(ground, pixels, blended=True), *sensor.limits)
        if MODALITIES[modality].unit == "dn":
            np.rint(out, out=out)
        if clouds is None:
            return out, np.ones(out.shape[1:], bool)
        hidden = np.maximum(clouds.cover, 0.45 * clouds.shadow) > 0.1
        return out, _crop(ground, _blend(hidden.astype(np.float32), grid.per_pixel) < 0.1, blended=True)

    def _clouds(self, grid: _Grid, sun: _Sun, day: int) -> _Clouds | None:
        if self.clouds == 0:
            return None
        # A power of a uniform number: its mean is `clouds`, and most dates are clearer.
        share = float(_draw(_hash(self.seed, "clouds", day))) ** (1 / self.clouds - 1)
        if share < 1e-3:
            return None
        base = 900 + 1100 * float(_draw(_hash(self.seed, "base", day)))
        away = base / max(sun.up, 0.2) * math.hypot(sun.east, sun.north)
        bearing = math.atan2(sun.east, sun.north)
        dx, dy = (round(away * f(bearing) / grid.step) * grid.step for f in (math.sin, math.cos))
        keys = (self.seed, "cloud", day)
        thick = _thickness(grid.x, grid.y, share, *keys)
        above = _thickness(np.round(grid.x + dx, 4), np.round(grid.y + dy, 4), share, *keys)
        cover = 1 - np.exp(np.float32(-2.6) * thick)
        shadow = (1 - np.exp(np.float32(-2.6) * above)) * (1 - cover)
        return _Clouds(cover=cover, bulk=np.clip(thick, 0, 1.2) / np.float32(1.2), shadow=shadow)

    def _listen(self, sensor: Radar, ground: Ground, day: int) -> Array:
        season, grid = _season(ground, self.seed, day), ground.grid
        surfaces = SURFACES.values()
        look = 1 if (day // sensor.revisit_days) % 2 else -1
        # Slopes that face the radar return more; it looks west or east, a bit northwards.
        tilt = np.clip(look * ground.east + np.float32(0.18) * ground.north, -0.5, 0.5)
        geometry = np.float32(10) ** (np.float32(-0.45) * tilt)
        plants = np.clip(season.green + 0.45 * season.dry + 0.8 * season.bloom, 0, 1)
        rough = 2.6 * (_draw(ground.key, "rough") - 0.5) + 1.4 * (_draw(ground.key, "rough", day // 20) - 0.5)
        wind = 1.5 * _weather(self.seed, day, "wind", days=2.0)
        still = np.array([surface.ground.endswith("water") for surface in surfaces])[ground.kind]
        ys, xs = (_index(t[:: grid.per_pixel], grid.step * grid.per_pixel) for t in (grid.y, grid.x))
        out = []
        for channel in (0, 1):
            ends = [(s.l_bare, s.l_full) if sensor.long_wave else (s.c_bare, s.c_full) for s in surfaces]
            bare, full = (np.array([pair[k][channel] for pair in ends])[ground.kind] for k in (0, 1))
            db = bare + (full - bare) * plants
            db += (1 - plants) * (5 * (season.moisture - 0.5) + rough) * ~still
            db += 1.2 * (_draw(ground.key, "echo", channel) - 0.5) + wind * still
            mean = (10 ** (db / 10)).astype(np.float32)
            power = _compose(ground, (mean, 0.10 * mean * plants, 0.12 * mean * season.bare))
            power = _blend(np.maximum(power, 1e-4) * geometry, grid.per_pixel)
            speckle = self._speckle(xs, ys, sensor.looks, day, channel)
            out.append(
                _crop(ground, 10 * np.log10(power * speckle + np.float32(3e-4 if channel else 6e-4)), blended=True)
            )
        return np.stack(out)

    def _speckle(self, xs: Array, ys: Array, looks: int, day: int, channel: int) -> Array:
        """Average independent echoes, each shared with the next pixel, as oversampled images have it."""
        xs, ys = np.append(xs, xs[-1] + 1), np.append(ys, ys[-1] - 1)
        table = _exponential_table()
        echo: Array = np.zeros((len(ys), len(xs)), np.float32)
        for look in range(looks):
            echo += table.take(_grain(xs, ys, self.seed, "speckle", day, channel, look))
        return (echo[1:, 1:] + echo[1:, :-1] + echo[:-1, 1:] + echo[:-1, :-1]) / np.float32(4 * looks)

    def _survey(self, modality: str, ground: Ground) -> Array:
        grid = ground.grid
        if modality == "worldcover":
            codes = np.zeros(256, np.float32)
            codes[[c.code for c in CLASSES]] = [c.worldcover for c in CLASSES]
            return codes[self.truth(ground)][None]
        if modality == "wri_canopy_height_map":
            forest = np.isin(ground.code, [SURFACES[name].code for name in ("broadleaf", "conifer")])
            trees = forest * ground.height
            return np.rint(_crop(ground, _blend(trees, grid.per_pixel), blended=True))[None]
        ys, xs = (_index(t[:: grid.per_pixel], grid.step * grid.per_pixel) for t in (grid.y, grid.x))
        surface = _blend(ground.elevation + np.float32(0.5) * ground.height, grid.per_pixel)
        surface += np.float32(0.8) * _normal(xs, ys, self.seed, modality)
        return np.rint(_crop(ground, surface, blended=True))[None]


def _index(t: Array, step: float) -> Array:
    """Number pixels from the origin of the coordinates."""
    return np.floor(t / step).astype(np.int64)


def _crop(ground: Ground, field: Array, *, blended: bool = False) -> Array:
    """Take the margin off; `blended` fields have one value per pixel already."""
    size = 1 if blended else ground.grid.per_pixel
    west, north = ground.grid.margin[:2]
    box = ground.box
    return field[north * size : (north + box.height) * size, west * size : (west + box.width) * size]


def _illumination(ground: Ground, sun: _Sun) -> Array:
    """Give the light on each sample against that on a plain in the open."""
    facing = (sun.up - sun.east * ground.east - sun.north * ground.north) / np.sqrt(
        1 + ground.east**2 + ground.north**2
    )
    light: Array = np.clip(0.25 + facing * np.float32(0.75 / max(sun.up, 0.15)), 0.2, 1.7)
    return light * ground.shade


def _spectrum(name: str, wavelength: float) -> float:
    return float(np.interp(wavelength, WAVELENGTHS, SPECTRA[name])) / 100


def _reflectance(ground: Ground, season: _Season, wavelength: float) -> tuple[Array, Array, Array]:
    """Give the stands' reflectance and what vigour and wetness add to it."""
    surfaces = SURFACES.values()
    green, bloom, below = (
        np.array([_spectrum(getattr(s, part), wavelength) for s in surfaces])[ground.kind]
        for part in ("green", "bloom", "ground")
    )
    soil = np.array([s.ground == "loam" for s in surfaces])[ground.kind]
    variety = np.array([s.variety for s in surfaces])[ground.kind]
    damp = 1 - (0.3 + 0.12 * (wavelength > 1.3)) * season.moisture
    below = np.where(soil, below * season.soil * damp, below)
    # Stands differ in brightness, in the red against the infrared and in water content.
    hue = 0.34 * (_draw(ground.key, "bright") - 0.5)
    for name, around, width, size in (
        ("visible", 0.5, 0.35, 0.34),
        ("infrared", 0.95, 0.25, 0.34),
        ("water", 1.9, 0.5, 0.44),
    ):
        hue = hue + size * math.exp(-(((wavelength - around) / width) ** 2)) * (_draw(ground.key, name) - 0.5)
    mixed = (
        season.green * green + season.dry * _spectrum("straw", wavelength) + season.bloom * bloom + season.bare * below
    )
    mixed *= 1 + variety * hue
    # The covers are the last rows of the table, whatever the window.
    first = len(mixed) - len(_COVERS) * _VARIANTS
    guest = np.array([_COVERS.index(s.mixed or "tree") * _VARIANTS for s in surfaces])[ground.kind]
    hosts = np.array([bool(s.mixed) for s in surfaces])[ground.kind]
    other = mixed[first + guest + (ground.key % _VARIANTS).astype(np.intp)]
    mixed += 0.55 * hosts * _draw(ground.key, "mixed") ** 1.5 * (other - mixed)
    plants = 0.13 * season.green * (green - below)
    return mixed.astype(np.float32), plants.astype(np.float32), (-0.11 * season.bare * below * soil).astype(np.float32)


def _kelvin(ground: Ground, season: _Season, wavelength: float, seed: int, day: int) -> tuple[Array, Array, Array]:
    """Give the stands' brightness temperature and what vigour and wetness add to it."""
    summer = 0.5 - 0.5 * math.cos(2 * math.pi * (to_date(day).timetuple().tm_yday - 20) / 365)
    air = 273 + 22 * summer + 3 * _weather(seed, day, "heat", days=8.0)
    heat = np.array([s.heat for s in SURFACES.values()])[ground.kind] + 7 * season.bare + 4 * season.dry
    kelvin = air + (0.25 + 0.75 * summer) * heat + (_draw(ground.key, "heat") - 0.5)
    below = 0.4 if wavelength > 11.5 else 0.0
    flat = np.full(len(kelvin), -0.5, np.float32)
    return (kelvin - below).astype(np.float32), flat, flat


def _compose(ground: Ground, stands: tuple[Array, Array, Array]) -> Array:
    """Spread the stands' values over the samples: mean, plus vigour, plus wetness, then the layers above."""
    mean, vigour, wet = stands
    field = mean.take(ground.stand)
    field += vigour.take(ground.stand) * ground.vigour
    field += wet.take(ground.stand) * ground.wet
    flat = field.ravel()
    for layer in ground.layers:
        flat[layer.where] += layer.cover * (mean[layer.row] - flat[layer.where])
    return field


def _cell(grid: _Grid, band: Band) -> int:
    """Count the pixels along the side of what a band sees as one."""
    pixel = grid.step * grid.per_pixel
    return max(n for n in (1, 2, 3, 6) if n == 1 or n * pixel <= band.gsd * 1.001)


def _radiance_counts(kelvin: Array, band: Band) -> Array:
    """Turn brightness temperature into the level-1 counts of Landsat 8's thermal bands (USGS constants)."""
    k1, k2 = (774.8853, 1321.0789) if band.wavelength is not None and band.wavelength < 11.5 else (480.8883, 1201.1442)
    return (np.float32(k1) / (np.exp(np.float32(k2) / kelvin) - 1) - np.float32(0.1)) / np.float32(3.342e-4)


# Scenes.

_CHUNK = 1024
"""Samples along the side of what is worked out at a time: memory does not grow with a scene."""
_CENTRE = (478440.0, 5295740.0)
"""Where, with seed 0, all classes are near: a river bend with a pit, a wood, fields and the edge of a town."""


def write_planet_scene(
    folder: str | Path,
    *,
    seed: int = 0,
    size_px: int = 512,
    dates: Sequence[dt.date | str] = ("2023-04-28", "2023-06-09", "2023-07-22", "2023-09-14"),
    modalities: Sequence[str] = ("sentinel2_l2a", "sentinel1"),
    labels: int = 200,
    origin: tuple[float, float] | None = None,
    clouds: float = 0.12,
) -> Path:
    """Write a square of the planet as a scene, with `labels.geojson` and the truth as `truth.tif`; give the folder.

    `size_px` counts pixels of 10 m and `origin` is the north-west corner in metres of EPSG:32633. Each modality is
    written at its own GSD; maps and other stills are written once. Labels are points spread over the scene and over its
    classes, a pixel or more inside their patch.
    """
    planet, folder = Planet(seed, clouds), Path(folder)
    unknown = [name for name in modalities if name not in SENSORS and name not in _MAPS]
    if unknown:
        raise InputError(f"the planet shows no {unknown[0]!r}; it has {', '.join((*SENSORS, *_MAPS))}")
    if size_px < 8 or not dates or not modalities:
        raise InputError(
            f"a scene of {size_px} pixels, dates {list(dates)} and modalities {list(modalities)} came; "
            "wanted 8 pixels or more and at least one of each"
        )
    days = sorted({to_days(date) for date in dates})
    half = size_px // 2 * 10
    corner = origin or (_CENTRE[0] - half, _CENTRE[1] + half)
    folder.mkdir(parents=True, exist_ok=True)
    items, places = [], _Places(_square(corner, 10, size_px), 200 * labels)
    for pixel in sorted({10.0, *map(_pixel, modalities)}):
        box = _square(corner, pixel, max(1, int(size_px * 10 / pixel)))
        views = [
            (name, to_date(day), folder / f"{name}_{to_date(day)}.tif")
            for name in modalities
            if _pixel(name) == pixel
            for day in (days if MODALITIES[name].kind == "series" else days[:1])
        ]
        with ExitStack() as stack:
            writers = [stack.enter_context(_writer(path, box, name)) for name, _, path in views]
            truth = stack.enter_context(_truth_writer(folder / "truth.tif", box)) if pixel == 10 else None
            for window, part in _chunks(box):
                ground = planet.ground(part)
                for (name, date, _), writer in zip(views, writers, strict=True):
                    pixels, valid = planet.observe(name, ground, date)
                    if not valid.all():
                        pixels[:, ~valid] = MODALITIES[name].nodata
                    writer.write(window, _stored(pixels, name))
                if truth is not None:
                    truth.write(window, planet.truth(ground))
                    places.look(ground, window)
        items += [make_item(path.stem, name, date, box, {"pixels": path}) for name, date, path in views]
    partial = folder / ".labels.geojson"
    partial.write_text(json.dumps(places.features(labels), indent=1), encoding="utf-8")
    partial.replace(folder / "labels.geojson")
    save_scene(folder, items, f"Planet {seed}: imagery that the package made up", "CC0-1.0")
    return folder


def _square(corner: tuple[float, float], pixel: float, size: int) -> GeoBox:
    return GeoBox((size, size), Affine(pixel, 0, corner[0], 0, -pixel, corner[1]), CRS)


def _pixel(modality: str) -> float:
    """Give the pixel size of a modality's files: that of its sharpest band, or of a product made coarser."""
    spec = MODALITIES[modality]
    return max(spec.gsd, min(band.gsd for band in spec.bands))


def _stored(pixels: Array, modality: str) -> Array:
    """Turn pixels into the type in which such files come."""
    spec, sensor = MODALITIES[modality], SENSORS.get(modality)
    if spec.unit == "db":
        return pixels.astype(np.float32)
    if spec.categorical or (isinstance(sensor, Optics) and sensor.limits[1] <= 255):
        return np.rint(pixels).astype(np.uint8)
    return np.rint(pixels).astype(np.int16 if spec.nodata is not None and spec.nodata < 0 else np.uint16)


def _writer(path: Path, grid: GeoBox, modality: str) -> CogWriter:
    spec = MODALITIES[modality]
    dtype = _stored(np.zeros(1), modality).dtype
    nodata = None if spec.unit == "db" else spec.nodata
    return CogWriter(path, grid, len(spec.bands), dtype, nodata=nodata, band_names=spec.band_names)


def _chunks(box: GeoBox) -> Iterator[tuple[Window, GeoBox]]:
    """Cut a box into parts of bounded work."""
    side = max(1, int(_CHUNK / math.ceil(box.resolution.x / 25)))
    for row in range(0, box.height, side):
        for col in range(0, box.width, side):
            height, width = min(side, box.height - row), min(side, box.width - col)
            yield Window(col, row, width, height), box[row : row + height, col : col + width]


def _truth_writer(path: Path, box: GeoBox) -> CogWriter:
    palette, names = {c.code: c.colour for c in CLASSES}, {c.code: c.name for c in CLASSES}
    return CogWriter(path, box, 1, np.uint8, nodata=0, band_names=("class",), palette=palette, categories=names)


class _Places:
    """Candidates for labels, spread over a box however few are taken from the start."""

    def __init__(self, box: GeoBox, count: int) -> None:
        # The R2 sequence (Roberts 2018), the plane's golden ratio.
        spots = np.mod(np.outer(np.arange(1, count + 1), (0.7548776662466927, 0.5698402909980532)) + 0.5, 1)
        self.rows, self.cols = (spots * box.height).astype(np.intp).T
        self.code = np.zeros(count, np.uint8)
        self.box = box

    def look(self, ground: Ground, window: Window) -> None:
        """Note the class of the places in a window, where their neighbours are of the same."""
        row, col = self.rows - window.row_off, self.cols - window.col_off
        here = np.flatnonzero((row >= 0) & (row < window.height) & (col >= 0) & (col < window.width))
        west, north = ground.grid.margin[:2]
        near = np.lib.stride_tricks.sliding_window_view(ground.code, (3, 3))
        around = near[row[here] + north - 1, col[here] + west - 1]
        pure = (around == around[:, 1:2, 1:2]).all(axis=(1, 2))
        self.code[here] = np.where(pure, around[:, 1, 1], 0)

    def features(self, count: int) -> dict[str, Any]:
        """Take the first place of each class, then the second of each, and so on, as GeoJSON points."""
        turn = np.full(len(self.code), len(self.code))
        for c in CLASSES:
            turn[self.code == c.code] = np.arange((self.code == c.code).sum())
        chosen = np.argsort(turn, kind="stable")[: min(count, int((self.code > 0).sum()))]
        x = self.box.affine.c + self.box.affine.a * (self.cols[chosen] + 0.5)
        y = self.box.affine.f + self.box.affine.e * (self.rows[chosen] + 0.5)
        lon, lat = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True).transform(x, y)
        names = {c.code: c.name for c in CLASSES}
        points = [
            {
                "type": "Feature",
                "properties": {"class": names[int(self.code[n])]},
                "geometry": {"type": "Point", "coordinates": [round(float(a), 7), round(float(b), 7)]},
            }
            for n, a, b in zip(chosen, lon, lat, strict=True)
        ]
        return {"type": "FeatureCollection", "name": "labels", "features": points}
