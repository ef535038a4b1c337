"""What `panterra-nano` learns from: places on invented planets, with the surface of every pixel."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from affine import Affine
from jaxtyping import UInt8
from odc.geo.geobox import GeoBox

from panterra.files import open_array
from panterra.modalities import MODALITIES
from panterra.planet import CLASSES, CRS, SOUTHERN_CLASSES, SURFACES, Ground, Planet
from panterra.recipes.nano import DATES, SIDE_PX
from panterra.sample import to_days

TRAINING_SEEDS = 5000
"""Planets below this seed are learned from; checks use seeds from 9000."""
PER_PLANET = 4
_PARTS_OF_OTHERS = {
    "margin": "grassland",
    "ley": "alfalfa",
    "needles": "conifer",
    "stream": "water",
    "tree": "broadleaf",
}
KINDS = tuple(name for name in SURFACES if name not in _PARTS_OF_OTHERS)
"""Surfaces that are told from each other, by the number in `Places.surface`."""
_KIND = np.array([KINDS.index(_PARTS_OF_OTHERS.get(name, name)) for name in SURFACES], np.uint8)
_LEVEL_1C = [MODALITIES["sentinel2"].band_names.index(band) for band in MODALITIES["sentinel2_l2a"].band_names]
_COARSE_M, _CELLS = 40, 12
"""Pixels of the overview of a planet, and the windows of 640 m along its side."""
_LAYOUT = {
    "sentinel2_l2a": (np.uint16, (DATES, 12, SIDE_PX, SIDE_PX)),
    "sentinel1": (np.float16, (DATES, 2, SIDE_PX, SIDE_PX)),
    "landsat": (np.uint16, (DATES, 11, SIDE_PX, SIDE_PX)),
    "days": (np.int32, (DATES,)),
    "surface": (np.uint8, (SIDE_PX, SIDE_PX)),
    "height": (np.float16, (SIDE_PX, SIDE_PX)),
    "elevation": (np.float32, (SIDE_PX, SIDE_PX)),
}
PLACE_BYTES = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in _LAYOUT.values())
"""What a place takes on disk."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Places:
    """Squares of 64 pixels: what three sensors saw on four dates of some year, and what is there; on disk."""

    sentinel2_l2a: np.ndarray
    sentinel1: np.ndarray
    landsat: np.ndarray
    """[N, 4, C, 64, 64] in declared units."""
    days: np.ndarray
    """[N, 4], days since 1970-01-01, rising."""
    surface: np.ndarray
    """[N, 64, 64], numbers of `KINDS`."""
    height: np.ndarray
    """[N, 64, 64], of what stands on the ground, in metres."""
    elevation: np.ndarray
    """[N, 64, 64], of the ground, in metres."""

    def __len__(self) -> int:
        return len(self.days)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open what `draw_places` wrote; nothing is read before it is asked for."""
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _LAYOUT})


def draw_places(
    folder: Path,
    count: int,
    *,
    seed: int,
    southern: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Places:
    """Look at places on planets, four on each, and keep them in a folder; what is there already is opened.

    Three of four places are drawn with a land cover class that takes turns by chance, so that towns, water and bare
    ground are not rare. Pixels measure 7.5, 10 or 14 m. Half of the images of Sentinel-2 keep their air (level 1C, in
    the bands of level 2A), and half of the planets have clouds. Southern places lie on planets with orchards,
    vineyards, scrub and dry grass, more or less, half of which have motorways.
    """
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: open_array(part / f"{name}.npy", dtype, (count, *shape)) for name, (dtype, shape) in _LAYOUT.items()
        }
        for first in range(0, count, PER_PLANET):
            rng = np.random.default_rng([seed, first])
            # Planet 0 is that of the demo and of the tests.
            planet = Planet(seed=int(rng.integers(TRAINING_SEEDS)) or 1, clouds=float(rng.choice([0, 0.15])))
            if southern:
                planet = replace(planet, south=float(rng.choice([0.0, 0.5, 1.0])), motorways=bool(rng.random() < 0.5))
            overview = Overview(planet, rng)
            for i in range(first, min(first + PER_PLANET, count)):
                if progress is not None:
                    progress(i, count)
                look_at(planet, planet.ground(overview.draw(rng)), rng, {name: x[i] for name, x in arrays.items()})
        for array in arrays.values():
            array.flush()
        part.rename(folder)
    return Places.open(folder)


class Overview:
    """Where the land cover classes are on 7,680 m of a planet."""

    def __init__(self, planet: Planet, rng: np.random.Generator) -> None:
        left, top = 500000 + 10 * rng.integers(-20000, 20000), 5300000 + 10 * rng.integers(-20000, 20000)
        self.left, self.top = left - left % _COARSE_M, top - top % _COARSE_M
        box = GeoBox((200, 200), Affine(_COARSE_M, 0, self.left, 0, -_COARSE_M, self.top), CRS)
        side = _CELLS * 16
        cells = planet.truth(box)[:side, :side].reshape(_CELLS, 16, _CELLS, 16).transpose(0, 2, 1, 3).reshape(-1, 256)
        codes = range(len(CLASSES) + len(SOUTHERN_CLASSES) + 1)
        self.shares = np.stack([(cells == code).mean(1) for code in codes], axis=1)

    def draw(self, rng: np.random.Generator) -> GeoBox:
        """Draw a square."""
        weights = None
        overall = self.shares.mean(0) + 0.002
        if rng.random() < 0.75:
            wanted = self.shares[:, int(rng.choice(np.flatnonzero(overall > 0.003)))]
            weights = wanted / wanted.sum() if wanted.sum() > 0 else None
        row, col = divmod(int(rng.choice(_CELLS**2, p=weights)), _CELLS)
        x = self.left + col * 640 + 320 + rng.integers(-160, 160)
        y = self.top - row * 640 - 320 + rng.integers(-160, 160)
        pixel = float(rng.choice((7.5, 10, 10, 10, 10, 14)))
        left, top = x - pixel * SIDE_PX / 2, y + pixel * SIDE_PX / 2
        return GeoBox((SIDE_PX, SIDE_PX), Affine(pixel, 0, left - left % pixel, 0, -pixel, top - top % pixel), CRS)


def look_at(planet: Planet, ground: Ground, rng: np.random.Generator, into: dict[str, np.ndarray]) -> None:
    """Photograph a place on four dates and write down what is there."""
    start = dt.date(2016, 1, 1) + dt.timedelta(days=int(rng.integers(8 * 365)))
    gaps = rng.integers(15, 110, DATES - 1)
    # The first draw is for nothing: without it the places would not be those that the shipped weights learned from.
    _, *airs = rng.random(1 + DATES) < 0.5
    for k, (days, air) in enumerate(zip((0, *gaps.cumsum()), airs, strict=True)):
        day = start + dt.timedelta(days=int(days))
        into["days"][k] = to_days(day)
        image = planet.observe("sentinel2" if air else "sentinel2_l2a", ground, day)[0]
        into["sentinel2_l2a"][k] = np.rint((image[_LEVEL_1C] if air else image).clip(0, 65535))
        into["sentinel1"][k] = planet.observe("sentinel1", ground, day)[0]
        into["landsat"][k] = np.rint(planet.observe("landsat", ground, day)[0].clip(0, 65535))
    into["surface"][:] = surface(ground)
    into["height"][:], into["elevation"][:] = inside(ground, ground.height), inside(ground, ground.elevation)


def surface(ground: Ground) -> UInt8[np.ndarray, "h w"]:
    """Number the surface that covers most of each pixel: of the stand and what lies over it, the largest share."""
    top, share = _KIND[ground.kind][ground.stand].ravel(), np.ones(ground.stand.size, np.float32)
    for layer in ground.layers:
        share[layer.where] *= 1 - layer.cover
        more = layer.cover > share[layer.where]
        where = layer.where[more]
        top[where], share[where] = _KIND[ground.kind[layer.row]][more], layer.cover[more]
    return inside(ground, top.reshape(ground.stand.shape))


def inside(ground: Ground, field: np.ndarray) -> np.ndarray:
    """Take the margin off a field of pixels that are samples."""
    west, north = ground.grid.margin[:2]
    return field[north : north + ground.box.height, west : west + ground.box.width]


def join(parts: Sequence[Places]) -> list[tuple[Places, int]]:
    """Number the places of several parts one after another."""
    return [(part, i) for part in parts for i in range(len(part))]
