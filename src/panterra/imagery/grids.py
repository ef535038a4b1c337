"""On which grid a place is put, and where a grid lies on the globe."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import shapely
from affine import Affine
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from rasterio.errors import RasterioError
from rasterio.warp import transform, transform_bounds

from panterra.errors import InputError
from panterra.imagery.raster import crs_for_rasterio

WIDE_M = 900_000
"""From the middle of a UTM zone, beyond which its distances are wrong by 1 % and more."""
UTM_LATITUDES = (-80.0, 84.0)


def common_crs(grids: Sequence[GeoBox]) -> CRS:
    """Choose the one CRS for what lies on several grids.

    It is the projected one that holds most of the area. Where that is a UTM zone of several and something lies farther
    than `WIDE_M` from its middle, it is Lambert's equal-area projection around the whole; near the poles, polar
    stereographic. Grids in degrees get the UTM zone, or the pole's projection, of their middle.
    """
    extents: dict[CRS, list[shapely.Geometry]] = {}
    for grid in grids:
        if grid.crs is not None and grid.crs.projected:
            extents.setdefault(grid.crs, []).append(shapely.box(*grid.boundingbox))
    lon, lat = _middle(grids)
    if extents:
        crs = max(extents, key=lambda crs: shapely.union_all(extents[crs]).area)
        if len({grid.crs for grid in grids}) == 1 or not _is_utm(crs):
            return crs
    polar = not UTM_LATITUDES[0] <= lat <= UTM_LATITUDES[1]
    if polar or not extents:
        crs = crs_at(lon, lat)
    if not polar and _too_wide(grids, crs):
        return CRS(f"+proj=laea +lat_0={round(lat)} +lon_0={round(lon)} +datum=WGS84 +units=m +no_defs")
    return crs


def crs_at(lon: float, lat: float) -> CRS:
    """Return the UTM zone of a place, or the polar stereographic projection (UPS) beyond where UTM ends."""
    if UTM_LATITUDES[0] <= lat <= UTM_LATITUDES[1]:
        return utm_at(lon, lat)
    return CRS("EPSG:5041" if lat > 0 else "EPSG:5042")


def utm_at(lon: float, lat: float) -> CRS:
    """Return the UTM zone of a place."""
    zone = int((lon + 180) // 6) % 60 + 1
    return CRS(f"EPSG:{32600 + zone if lat >= 0 else 32700 + zone}")


@functools.lru_cache(maxsize=4096)
def bounds_in(grid: GeoBox, crs: CRS | None) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of a grid in another CRS; infinite where it cannot be said."""
    west, south, east, north = grid.boundingbox
    if grid.crs == crs:
        return west, south, east, north
    try:
        return cast(
            tuple[float, float, float, float],
            transform_bounds(crs_for_rasterio(grid.crs), crs_for_rasterio(crs), west, south, east, north),
        )
    except RasterioError:
        return -math.inf, -math.inf, math.inf, math.inf


def lonlat(crs: CRS | None, x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return longitudes and latitudes of places."""
    return cast(tuple[list[float], list[float]], transform(crs_for_rasterio(crs), "EPSG:4326", x, y)[:2])


def footprint(box: GeoBox, *, per_side: int = 1) -> tuple[dict[str, Any], list[float]]:
    """Return the outline of a box as GeoJSON and as west, south, east, north in degrees.

    Each side is drawn by `per_side` points. At the antimeridian the outline is cut in two and west is greater than
    east; around a pole it reaches from -180 to 180 (RFC 7946, sections 3.1.9 and 5.2).
    """
    height, width = box.shape
    steps = [i / per_side for i in range(per_side)]
    edge = [
        *((s, 1) for s in steps),
        *((1, 1 - s) for s in steps),
        *((1 - s, 0) for s in steps),
        *((0, s) for s in steps),
    ]
    x, y = zip(*(box.affine @ (across * width, down * height) for across, down in edge), strict=True)
    lon, lat = (np.round(values, 9) for values in lonlat(box.crs, x, y))
    path = _unwrapped(np.append(lon, lon[0]))
    lat = np.append(lat, lat[0])
    around = not math.isclose(path[0], path[-1], abs_tol=1e-6)
    if not around and path.min() >= -180 and path.max() <= 180:
        ring = [[float(a), float(b)] for a, b in zip(path, lat, strict=True)]
        return {"type": "Polygon", "coordinates": [ring]}, [*map(float, (path.min(), lat.min(), path.max(), lat.max()))]
    whole = onto_globe(_ring(path, lat))
    _, south, _, north = whole.bounds
    west, east = (-180.0, 180.0) if around else (_turned(path.min()), _turned(path.max()))
    return cast(dict[str, Any], shapely.geometry.mapping(whole)), [west, float(south), east, float(north)]


def onto_globe(geometry: shapely.Geometry) -> shapely.Geometry:
    """Bring polygons whose longitudes go on beyond 180 degrees into -180 to 180, cut at the antimeridian.

    Their outer rings run counterclockwise (RFC 7946, sections 3.1.6 and 3.1.9).
    """
    # A collection may hold a MultiPolygon.
    polygons = [part for part in shapely.get_parts(shapely.get_parts(geometry)) if part.geom_type == "Polygon"]
    cut = [part for polygon in polygons for k in (-2, -1, 0, 1, 2) for part in _between(polygon, -180 + 360 * k)]
    whole = shapely.get_parts(shapely.union_all(cut))
    parts = [shapely.geometry.polygon.orient(part) for part in whole if part.geom_type == "Polygon"]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def unwrapped(geometry: shapely.Geometry) -> shapely.Geometry:
    """Read polygons as drawn on the globe, the shorter way from point to point, and cut them at the antimeridian.

    So are the outlines of images meant that providers do not cut. What has no area then, as a strip around the
    globe, stays as it is.
    """
    west, _, east, _ = geometry.bounds
    if west >= -180 and east <= 180 and east - west <= 180:
        return geometry
    parts = []
    for polygon in shapely.get_parts(geometry):
        outer, *holes = (
            _ring(_unwrapped(lon), lat)
            for lon, lat in (shapely.get_coordinates(ring).T for ring in (polygon.exterior, *polygon.interiors))
        )
        drawn = onto_globe(shapely.make_valid(outer))
        for hole in holes:
            drawn = drawn.difference(onto_globe(shapely.make_valid(hole)))
        parts.append(drawn if drawn.area else onto_globe(polygon))
    return shapely.union_all(parts)


def extent(geometry: shapely.Geometry) -> tuple[float, float, float, float]:
    """Return the smallest west, south, east, north around polygons; over the antimeridian west is greater than east.

    RFC 7946, section 5.2: it leaves out the widest gap between longitudes.
    """
    _, south, _, north = geometry.bounds
    spans = sorted((part.bounds[0], part.bounds[2]) for part in shapely.get_parts(geometry))
    west, reached = spans[0][0], spans[0][1]
    gaps = []
    for left, right in spans[1:]:
        gaps.append((left - reached, left, reached))
        reached = max(reached, right)
    # Where two gaps are equally wide, the one at the antimeridian is left out.
    _, west, east = max([(west + 360 - reached, west, reached), *gaps], key=lambda gap: gap[0])
    return west, south, east, north


def enclosing(boxes: Sequence[GeoBox], step: int) -> GeoBox:
    """Return the smallest grid over several, in the CRS that `common_crs` chooses, on multiples of `step`."""
    crs = common_crs(boxes)
    edges = np.array([bounds_in(box, crs) for box in boxes])
    if not np.isfinite(edges).all():
        raise InputError("the parts of the area lie too far from each other for one grid; take them one by one")
    return rounded((*edges[:, :2].min(0), *edges[:, 2:].max(0)), crs, step, pixel=step)


def rounded(bounds: tuple[float, float, float, float], crs: CRS, step: int, *, pixel: int) -> GeoBox:
    """Return the grid of a pixel size whose edges are the multiples of `step` around left, bottom, right, top."""
    # What reaches a millionth of a step beyond an edge lies on it: degrees are rounded.
    left, bottom = (math.floor(edge / step + 1e-6) * step for edge in bounds[:2])
    right, top = (math.ceil(edge / step - 1e-6) * step for edge in bounds[2:])
    shape = (round((top - bottom) / pixel), round((right - left) / pixel))
    return GeoBox(shape, Affine(pixel, 0, left, 0, -pixel, top), crs)


def _ring(path: np.ndarray, lat: np.ndarray) -> shapely.Polygon:
    """Close a path of unwrapped longitudes: over the pole that it runs around, if it does."""
    points = list(zip(path, lat, strict=True))
    if not math.isclose(path[0], path[-1], abs_tol=1e-6):
        pole = math.copysign(90, lat.mean())
        points += [(path[-1], pole), (path[0], pole)]
    return shapely.Polygon(points)


def _between(polygon: shapely.Polygon, west: float) -> list[shapely.Polygon]:
    """Cut out the 360 degrees from `west` on, and bring them to -180 to 180."""
    cut = shapely.intersection(polygon, shapely.box(west, -90, west + 360, 90))
    parts = [part for part in shapely.get_parts(cut) if part.geom_type == "Polygon" and part.area > 0]
    return [shapely.transform(part, lambda xy: np.round(xy - (west + 180, 0), 9)) for part in parts]


def _unwrapped(lon: np.ndarray) -> np.ndarray:
    """Follow longitudes along a path, the shorter way round at each step."""
    steps = [(b - a + 180) % 360 - 180 for a, b in pairwise(lon)]
    # Where the path stays on one side nothing is recomputed.
    near = all(abs(b - a) <= 180 for a, b in pairwise(lon))
    return lon if near else lon[0] + np.concatenate([[0], np.cumsum(steps)])


def _turned(lon: float) -> float:
    return float((lon + 180) % 360 - 180)


def _middle(grids: Sequence[GeoBox]) -> tuple[float, float]:
    """Longitude and latitude of the middle of several grids, on the sphere: the antimeridian is no border."""
    total = np.zeros(3)
    for grid in grids:
        height, width = grid.shape
        corners = [grid.affine @ corner for corner in ((0, 0), (width, 0), (0, height), (width, height))]
        lon, lat = np.radians(lonlat(grid.crs, *zip(*corners, strict=True)))
        total += np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)]).sum(1)
    x, y, z = total
    return math.degrees(math.atan2(y, x)), math.degrees(math.atan2(z, math.hypot(x, y)))


def _is_utm(crs: CRS) -> bool:
    return crs.epsg is not None and crs.epsg // 100 in (326, 327) and 1 <= crs.epsg % 100 <= 60


def _too_wide(grids: Sequence[GeoBox], crs: CRS) -> bool:
    edges = np.array([bounds_in(grid, crs) for grid in grids])
    return not bool((np.abs(edges[:, ::2] - 500_000) <= WIDE_M).all())
