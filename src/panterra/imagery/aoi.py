"""The area that somebody asked for, and its grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import geopandas
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from pyogrio.errors import DataSourceError
from pyproj import Transformer

from panterra.errors import InputError
from panterra.imagery.grids import utm_at
from panterra.modalities import MODALITIES

FAR_DEGREES = 9.0
"""Of longitude from the middle of a UTM zone, beyond which its distances are wrong by more than 1 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """A geometry in longitude and latitude, and the one grid on which everything over it is put."""

    geometry: shapely.Geometry
    box: GeoBox
    """The common grid of 10 m: the rectangle around the geometry in its UTM zone."""
    decisions: tuple[str, ...] = ()

    def grid(self, modality: str) -> GeoBox:
        """Return the grid of a modality: the same rectangle at its own GSD."""
        factor = max(round(MODALITIES[modality].gsd / 10), 1)
        height, width = self.box.shape
        return GeoBox((height // factor, width // factor), self.box.affine @ Affine.scale(factor), self.box.crs)


def read_area(where: str | Path, modalities: Iterable[str]) -> Area:
    """Read polygons from any vector file, or "west,south,east,north" in degrees.

    The rectangle is widened to whole pixels of all `modalities`, counted from the origin of the zone.
    """
    geometry = _box_of(str(where)) or _read(Path(where))
    west, south, east, north = geometry.bounds
    if west < -180 or east > 180 or east - west > 180:
        raise InputError(
            f"the area reaches from {west:g} to {east:g} degrees of longitude, over the antimeridian; "
            "cut it at 180 degrees and fetch each part"
        )
    if south < -80 or north > 84:
        raise InputError(
            f"the area reaches from {south:g} to {north:g} degrees of latitude, beyond where UTM ends; "
            "cut it at -80 and 84 degrees"
        )
    middle = shapely.box(west, south, east, north).centroid
    crs = utm_at(middle.x, middle.y)
    meridian = math.floor(middle.x / 6) * 6 + 3
    far = max(abs(west - meridian), abs(east - meridian))
    if far > FAR_DEGREES:
        raise InputError(
            f"the area reaches {far:.1f} degrees of longitude from the middle of its UTM zone, too far for one grid; "
            f"cut it into parts of at most {FAR_DEGREES:g} degrees and fetch each"
        )
    decisions: list[str] = []
    if math.floor(west / 6) != math.floor(east / 6):
        decisions.append(f"the area lies in several UTM zones; it is put on the grid of {crs}, the zone of its middle")
    outline = shapely.segmentize(geometry, max(east - west, north - south, 1e-6) / 50)
    place = Transformer.from_crs("EPSG:4326", f"EPSG:{crs.epsg}", always_xy=True)
    in_utm = shapely.transform(outline, lambda xy: shapely.get_coordinates(shapely.points(*place.transform(*xy.T))))
    step = _step(modalities)
    west, south, east, north = in_utm.bounds
    # What reaches a millionth of a step beyond an edge lies on it: degrees are rounded.
    left, bottom = (math.floor(edge / step + 1e-6) * step for edge in (west, south))
    right, top = (math.ceil(edge / step - 1e-6) * step for edge in (east, north))
    shape = (round((top - bottom) / 10), round((right - left) / 10))
    box = GeoBox(shape, Affine(10, 0, left, 0, -10, top), crs)
    return Area(geometry=geometry, box=box, decisions=tuple(decisions))


def _step(modalities: Iterable[str]) -> int:
    """Metres to which the edges are rounded, so that each modality has whole pixels; finer ones have them at 10 m."""
    return math.lcm(10, *(round(MODALITIES[name].gsd) for name in modalities if MODALITIES[name].gsd > 10))


def _box_of(text: str) -> shapely.Geometry | None:
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError:
        return None
    if not (west < east and south < north):
        raise InputError(
            f"the area {text} is empty; wanted west,south,east,north in degrees (over the antimeridian: two areas)"
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
    geometry = shapely.make_valid(frame.to_crs("EPSG:4326").union_all())
    if geometry.is_empty or geometry.area == 0:
        raise InputError(f"{path} holds no area; wanted polygons")
    return geometry
