"""The area that somebody asked for, and its grids."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import shapely
from affine import Affine
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from pyogrio.errors import DataSourceError
from pyproj import Transformer

from panterra.errors import InputError
from panterra.imagery.grids import (
    UTM_LATITUDES,
    crs_at,
    enclosing,
    extent,
    onto_globe,
    rounded,
    unwrapped,
    utm_at,
)
from panterra.modalities import MODALITIES

FAR_DEGREES = 9.0
"""Of longitude from the middle of a UTM zone, beyond which its distances are wrong by more than 1 %."""
POLAR_LATITUDE = 75.5
"""Towards the equator from here on, distances in polar stereographic (UPS) are wrong by more than 1 %."""
OVERLAP_DEGREES = 0.002
"""By which the parts of an area reach over the borders of their zones, so that no gap is left where they meet."""
SMALLEST = 1e-8
"""Square degrees, about a pixel, up to which a part is nothing but rounding."""
BENT_DEGREES = 0.1
"""Steps in which edges are followed: at 85 degrees of latitude a step strays from its parallel by 0.2 m."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """A geometry in longitude and latitude within -180 to 180, and the grid of what is put over it."""

    geometry: shapely.Geometry
    box: GeoBox
    """The common grid of 10 m: the rectangle around the geometry, or around the grids of its parts."""
    cut: tuple[Area, ...] = ()
    """Where one grid does not do: what lies in each UTM zone, or around a pole, on a grid of its own."""
    share: float = 1.0
    """What part of the whole area this is; the shares of all parts add up to 1."""
    decisions: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Area, ...]:
        """What has a grid of its own: the whole area, where it is not cut."""
        return self.cut or (self,)

    @property
    def searched(self) -> tuple[tuple[float, float, float, float], ...]:
        """West, south, east, north of what is searched: two over the antimeridian, where APIs read one differently."""
        west, south, east, north = (round(edge, 7) for edge in extent(self.geometry))
        if west <= east:
            return ((west, south, east, north),)
        return (west, south, 180.0, north), (-180.0, south, east, north)

    def grid(self, modality: str) -> GeoBox:
        """Return the grid of a modality: the same rectangle at its own GSD."""
        factor = max(round(MODALITIES[modality].gsd / 10), 1)
        height, width = self.box.shape
        return GeoBox((height // factor, width // factor), self.box.affine @ Affine.scale(factor), self.box.crs)


def read_area(where: str | Path, modalities: Iterable[str]) -> Area:
    """Read polygons from any vector file, or "west,south,east,north" in degrees; over the antimeridian west > east.

    The rectangle is widened to whole pixels of all `modalities`, counted from the origin of the zone.
    """
    geometry = _box_of(str(where)) or _read(Path(where))
    if geometry.bounds[0] < -180 or geometry.bounds[2] > 180:
        geometry = onto_globe(geometry)
    step = _step(modalities)
    crs, why = _one_grid(geometry)
    if crs is not None:
        return Area(geometry=geometry, box=_rectangle(geometry, crs, step), decisions=(why,) if why else ())
    parts = _by_zone(geometry)
    total = sum(part.area for _, part in parts)
    cut = tuple(Area(geometry=part, box=_rectangle(part, zone, step), share=part.area / total) for zone, part in parts)
    names = ", ".join(str(part.box.crs) for part in cut)
    whole = enclosing([part.box for part in cut], 10)
    return Area(geometry=geometry, box=whole, cut=cut, decisions=(f"{why}; each part has a grid of its own: {names}",))


def _one_grid(geometry: shapely.Geometry) -> tuple[CRS | None, str | None]:
    """Choose the CRS of an area that one grid can show, else None; and say what is unusual about it."""
    west, south, east, north = extent(geometry)
    if south < UTM_LATITUDES[0] or north > UTM_LATITUDES[1]:
        if max(south, -north) >= POLAR_LATITUDE:
            crs = crs_at(0, math.copysign(90, south))
            return crs, f"the area reaches beyond where UTM ends; it is put on the polar stereographic grid of {crs}"
        return None, "the area reaches beyond where UTM ends"
    if ((east - west) % 360 or 360) > 180:
        raise InputError(
            f"the area reaches from {west:g} to {east:g} degrees of longitude, around more than half of the globe; "
            "over the antimeridian write west,south,east,north with west > east, or cut polygons at 180 degrees"
        )
    if west > east:
        return None, "the area lies over the antimeridian"
    middle = shapely.box(west, south, east, north).centroid
    meridian = math.floor(middle.x / 6) * 6 + 3
    if max(abs(west - meridian), abs(east - meridian)) > FAR_DEGREES:
        return None, f"the area reaches over {FAR_DEGREES:g} degrees of longitude from the middle of its UTM zone"
    crs = utm_at(middle.x, middle.y)
    if math.floor(west / 6) == math.floor(east / 6):
        return crs, None
    return crs, f"the area lies in several UTM zones; it is put on the grid of {crs}, the zone of its middle"


def _by_zone(geometry: shapely.Geometry) -> list[tuple[CRS, shapely.Geometry]]:
    """Cut an area at the borders of UTM zones, and where they end; from west to east, the poles last."""
    south, north = UTM_LATITUDES
    over = OVERLAP_DEGREES
    first = extent(geometry)[0]
    # A zone that ends west of where the area begins comes after the antimeridian.
    lefts = sorted(range(-180, 180, 6), key=lambda left: (left + 6 <= first, left))
    zones = [shapely.box(left - over, south - over, left + 6 + over, north + over) for left in lefts]
    poles = [shapely.box(-180, north - over, 180, 90), shapely.box(-180, -90, 180, south + over)]
    around = shapely.union_all(
        [shapely.transform(geometry, lambda xy, k=k: xy + np.array((k, 0))) for k in (-360, 0, 360)]
    )
    parts = []
    for strip in (*zones, *poles):
        part = onto_globe(shapely.intersection(around, strip))
        # What another zone holds but for the overlap needs no grid.
        if shapely.intersection(part, onto_globe(strip.buffer(-over, join_style="mitre"))).area > SMALLEST:
            parts.append((crs_at(strip.centroid.x, part.centroid.y), part))
    return parts


def _rectangle(geometry: shapely.Geometry, crs: CRS, step: int) -> GeoBox:
    """Lay the grid of 10 m whose edges are multiples of a step of metres around an area."""
    west, south, east, north = geometry.bounds
    outline = shapely.segmentize(geometry, min(max(east - west, north - south, 1e-6) / 50, BENT_DEGREES))
    place = Transformer.from_crs("EPSG:4326", crs.proj, always_xy=True)
    there = shapely.transform(outline, lambda xy: np.stack(place.transform(*xy.T), -1))
    return rounded(there.bounds, crs, step, pixel=10)


def _step(modalities: Iterable[str]) -> int:
    """Metres to which the edges are rounded, so that each modality has whole pixels; finer ones have them at 10 m."""
    return math.lcm(10, *(round(MODALITIES[name].gsd) for name in modalities if MODALITIES[name].gsd > 10))


def _box_of(text: str) -> shapely.Geometry | None:
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError:
        return None
    east += 360 if west > east else 0
    if not (-90 <= south < north <= 90 and -360 <= west < east <= min(west + 360, 540)):
        raise InputError(
            f"the area {text} is empty; wanted west,south,east,north in degrees, west > east over the antimeridian"
        )
    return shapely.box(west, south, east, north)


def _read(path: Path) -> shapely.Geometry:
    if not path.is_file():
        raise InputError(f"there is no file {path}; --aoi takes a vector file or west,south,east,north in degrees")
    try:
        frame = geopandas.read_file(path)
    except DataSourceError as error:
        raise InputError(f"{path} is no vector file: {error}") from None
    if frame.crs is None:
        raise InputError(f"{path} has no coordinate reference system; give it one, or write it as GeoJSON")
    if frame.crs.is_projected:
        # Straight lines of a projection are bent in degrees, and may run over the antimeridian or around a pole.
        west, south, east, north = frame.total_bounds
        bent = frame.segmentize(max(east - west, north - south, 1e-3) / 200).to_crs("EPSG:4326")
        geometry = shapely.union_all([unwrapped(shape) for shape in bent])
    else:
        geometry = frame.to_crs("EPSG:4326").union_all()
    geometry = shapely.make_valid(geometry)
    if geometry.is_empty or geometry.area == 0:
        raise InputError(f"{path} holds no area; wanted polygons")
    return geometry
