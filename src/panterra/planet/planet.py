"""The planet as others see it: its truth, and what sensors show of it."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.planet.camera import photograph
from panterra.planet.chance import Array, draw_normal
from panterra.planet.ground import Ground, blend, crop, number_pixels
from panterra.planet.painting import paint_ground
from panterra.planet.radar import listen
from panterra.planet.sensors import MAPS, SENSORS, Optics
from panterra.planet.surfaces import CLASSES, SOUTHERN_CLASSES, SURFACES
from panterra.sample import to_days


@dataclass(frozen=True, slots=True)
class Planet:
    """A planet with known truth, the same for everybody who knows its seed."""

    seed: int = 0
    clouds: float = 0.12
    """Share of the ground under clouds, over many dates: most are nearly clear and some are not."""
    south: float = 0.0
    """How many of the fields are orchards, vineyards and olive groves, and of the meadows and woods scrub and dry
    grass: 0 none, 1 nearly all."""
    motorways: bool = False
    """Whether motorways cross the country every few kilometres."""

    def __post_init__(self) -> None:
        if not 0 <= self.clouds < 1:
            raise InputError(f"clouds={self.clouds} came; wanted a share from 0 to below 1")
        if not 0 <= self.south <= 1:
            raise InputError(f"south={self.south} came; wanted a share from 0 to 1")

    def ground(self, box: GeoBox) -> Ground:
        """Work out what lies where: the costly part, to be shared by the dates and sensors of a box."""
        return paint_ground(self.seed, box, south=self.south, motorways=self.motorways)

    def truth(self, where: GeoBox | Ground) -> Array:
        """Give the class codes uint8 [H, W], the commonest in each pixel. Crops keep to their fields over the years."""
        ground = self._as_ground(where)
        size = ground.grid.per_pixel
        if size == 1:
            return crop(ground, ground.code)
        classes = (*CLASSES, *SOUTHERN_CLASSES) if self.south else CLASSES
        counts = np.stack([blend((ground.code == c.code).astype(np.float32), size) for c in classes])
        return crop(ground, np.array([c.code for c in classes], np.uint8)[counts.argmax(axis=0)], blended=True)

    def observe(self, modality: str, where: GeoBox | Ground, date: dt.date | str) -> tuple[Array, Array]:
        """Look at a box on a date: float32 [C, H, W] in the modality's declared unit and bool [H, W], True where data.

        A band coarser than the box's pixels shows blocks of 1, 2, 3 or 6 of them, the most that its GSD holds.
        """
        sensor = SENSORS.get(modality)
        if sensor is None and modality not in MAPS:
            raise InputError(f"the planet shows no {modality!r}; it has {', '.join((*SENSORS, *MAPS))}")
        ground, day = self._as_ground(where), to_days(date)
        if isinstance(sensor, Optics):
            return photograph(modality, sensor, ground, day, clouds=self.clouds)
        pixels = self._survey(modality, ground) if sensor is None else listen(sensor, ground, day)
        return pixels, np.ones(pixels.shape[1:], bool)

    def _as_ground(self, where: GeoBox | Ground) -> Ground:
        if not isinstance(where, Ground):
            return self.ground(where)
        if where.seed != self.seed:
            raise InputError(f"the ground of planet {where.seed} came; wanted that of planet {self.seed}: make it anew")
        return where

    def _survey(self, modality: str, ground: Ground) -> Array:
        grid = ground.grid
        if modality == "worldcover":
            codes = np.zeros(256, np.float32)
            for c in (*CLASSES, *SOUTHERN_CLASSES):
                codes[c.code] = c.worldcover
            return codes[self.truth(ground)][None]
        if modality == "wri_canopy_height_map":
            forest = np.isin(ground.code, [SURFACES[name].code for name in ("broadleaf", "conifer")])
            trees = forest * ground.height
            return np.rint(crop(ground, blend(trees, grid.per_pixel), blended=True))[None]
        ys, xs = number_pixels(grid)
        surface = blend(ground.elevation + np.float32(0.5) * ground.height, grid.per_pixel)
        surface += np.float32(0.8) * draw_normal(xs, ys, self.seed, modality)
        return np.rint(crop(ground, surface, blended=True))[None]
