"""Which part of a grid is mapped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import rasterio.features
import shapely
from jaxtyping import Bool
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from pyproj.exceptions import CRSError

from panterra.errors import InputError
from panterra.imagery.grids import bounds_in, footprint
from panterra.imagery.stac import Scene
from panterra.mapping.embeddings import EmbeddingStore
from panterra.mapping.search_query import read_places
from panterra.mapping.tiles import Tile, Window
from panterra.modalities import MODALITIES
from panterra.models.features import Encoder

Area: TypeAlias = shapely.Geometry
"""In longitude and latitude, within -180 to 180."""

PLACED = ("series", "still")
"""Kinds of modality that show places; weather is the same everywhere."""
EDGES = 200
"""Into so many parts the size of an area is cut where its edges are bent by a projection."""


def read_area(where: str | Path | Area) -> Area:
    """Read polygons from any vector file, or "west,south,east,north" in degrees; over the antimeridian west > east."""
    if isinstance(where, str | Path):
        box = _box_of(str(where))
        if box is None and not Path(where).is_file():
            raise InputError(f"there is no file {where}; wanted polygons, or west,south,east,north in degrees")
        geometry = box or shapely.union_all(read_places(where).to_crs("EPSG:4326").make_valid())
    else:
        geometry = where
    if not geometry.area:
        raise InputError(f"{where} holds no area; wanted polygons")
    return geometry


def _box_of(text: str) -> Area | None:
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError:
        return None
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90 and west != east):
        raise InputError(f"the area {text} is none; wanted west,south,east,north in degrees")
    if west < east:
        return shapely.box(west, south, east, north)
    return shapely.MultiPolygon([shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)])


def parse_crs(text: str) -> CRS:
    """Parse a projected CRS in metres, such as EPSG:3035."""
    try:
        crs = CRS(text)
    except CRSError:
        raise InputError(f"{text!r} is no coordinate reference system; wanted one such as EPSG:3035") from None
    if not crs.projected or crs.proj.axis_info[0].unit_conversion_factor != 1:
        raise InputError(f"{text} is not in metres; choose a projected CRS in metres, such as a UTM zone")
    return crs


def lay_grid(scene: Scene, resolution: float, *, crs: CRS | None = None, area: Area | None = None) -> GeoBox:
    """Lay a grid over a scene, or over the part of it that lies in an area; see `Scene.geobox` for the CRS."""
    if area is None:
        return scene.geobox(resolution, crs=crs)
    within = tuple(item for item in scene.items if item.grid is None or _meets(item.grid, area))
    if not any(item.grid is not None for item in within):
        raise InputError("the scene shows nothing of the area; wanted an area that meets the scene")
    # Weather and maps may reach far: the grid is that of what `geobox` looks at, and of the area.
    box = replace(scene, items=within).geobox(resolution, crs=crs)
    window = _window_around(_projected(area, box.crs).bounds, box)
    if window is None:
        raise InputError("the scene shows nothing of the area; wanted an area that meets the scene")
    return box[window.slices]


def common_grid(
    scene: Scene,
    encoder: Encoder,
    modalities: Sequence[str] | None = None,
    *,
    crs: str | None = None,
    area: Area | None = None,
) -> GeoBox:
    """Lay the common grid over a scene: 10 m, or the finest of the modalities to be used where all are coarser."""
    used = [MODALITIES[name] for name in modalities or scene.modalities if name in encoder.modalities]
    sizes = [spec.gsd for spec in used if spec.kind in ("series", "still")]
    resolution = max(10.0, min(sizes, default=10.0))
    return lay_grid(scene, resolution, crs=parse_crs(crs) if crs is not None else None, area=area)


def cut_store(store: EmbeddingStore, *, box: GeoBox | None, area: Area | None) -> tuple[EmbeddingStore, Coverage]:
    """View the patches of a store that reach into a box in its CRS, or into an area; outside of the area is nodata."""
    assert store.box.crs is not None
    if box is not None and box.crs != store.box.crs:
        own = store.box.crs.proj.name
        raise InputError(f"the box is in {box.crs}, the embeddings are in {own}; give an aoi, or a box in that CRS")
    there = None if area is None else _projected(area, store.box.crs)
    bounds = box.boundingbox.bbox if box is not None else there.bounds if there is not None else None
    window = None if bounds is None else _window_around(bounds, store.box)
    if window is None:
        raise InputError("the embeddings show nothing of the area; wanted an area that meets them")
    everywhere = np.array([[-math.inf, -math.inf, math.inf, math.inf]])
    coverage = Coverage(grid=store.box[window.slices], seen=everywhere, area=there)
    return store.part(window, coverage.inside), coverage


def _window_around(bounds: tuple[float, float, float, float], box: GeoBox) -> Window | None:
    """Return the pixels of a box that some bounds, in its CRS, reach into; None where there are none."""
    west, south, east, north = bounds
    (left, top), (right, bottom) = (~box.affine @ corner for corner in ((west, north), (east, south)))
    rows = max(math.floor(top + 1e-6), 0), min(math.ceil(bottom - 1e-6), box.shape.y)
    cols = max(math.floor(left + 1e-6), 0), min(math.ceil(right - 1e-6), box.shape.x)
    if rows[0] >= rows[1] or cols[0] >= cols[1]:
        return None
    return Window(row=rows[0], col=cols[0], height=rows[1] - rows[0], width=cols[1] - cols[0])


def _meets(grid: GeoBox, area: Area) -> bool:
    shown, _ = footprint(grid, per_side=8)
    return bool(shapely.intersects(shapely.geometry.shape(shown), area))


def _projected(area: Area, crs: CRS | None) -> Area:
    """Bring an area into the CRS of a grid, its edges bent as the projection bends them."""
    assert crs is not None
    west, south, east, north = area.bounds
    parts = shapely.segmentize(area, max(min(east - west, 10), min(north - south, 10), 1e-6) / EDGES)
    place = Transformer.from_crs("EPSG:4326", crs.proj, always_xy=True)
    there = shapely.transform(parts, lambda xy: np.stack(place.transform(*xy.T), -1))
    if not np.isfinite(shapely.get_coordinates(there)).all():
        raise InputError(f"part of the area lies where {crs} cannot show it; choose another CRS or a smaller area")
    return shapely.make_valid(there)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Where on a grid of patches there may be something to map, told without reading an image."""

    grid: GeoBox
    seen: np.ndarray
    """Left, bottom, right and top of each image in the CRS of the grid, float64 [n, 4]."""
    area: Area | None
    """In the CRS of the grid; None: everything."""

    @classmethod
    def of(
        cls, scene: Scene, grid: GeoBox, *, modalities: tuple[str, ...], reach: float, area: Area | None
    ) -> Coverage:
        """Gather where the images of some modalities lie; each reaches `reach` metres beyond its edge."""
        placed = [i for i in scene.items if i.modality in modalities and MODALITIES[i.modality].kind in PLACED]
        everywhere = (-math.inf, -math.inf, math.inf, math.inf)
        edges = {bounds_in(item.grid, grid.crs) if item.grid is not None else everywhere for item in placed}
        known = [e if all(map(math.isfinite, e)) else everywhere for e in edges]
        seen = np.array(sorted(known), np.float64).reshape(-1, 4) + np.array([-reach, -reach, reach, reach])
        return cls(grid=grid, seen=seen, area=None if area is None else _projected(area, grid.crs))

    def windows(self, tile: Tile) -> tuple[Window, ...]:
        """Return the windows of a tile that an image and the area reach into."""
        near = self.seen[_touching(self.seen, self._bounds(tile.reach))]
        if not len(near):
            return ()
        windows = [w for w in tile.windows if _touching(near, self._bounds(w)).any()]
        if self.area is None or not windows:
            return tuple(windows)
        inside = self.inside(tile.reach)
        return tuple(w for w in windows if inside[w.within(tile.reach).slices].any())

    def reaches(self, window: Window) -> bool:
        """Tell whether some of a window lies in the area and may be shown by an image."""
        return bool(_touching(self.seen, self._bounds(window)).any() and self.inside(window).any())

    def inside(self, window: Window) -> Bool[np.ndarray, "h w"]:
        """Tell which patches of a window have their middle in the area."""
        shape = window.height, window.width
        if self.area is None:
            return np.ones(shape, np.bool_)
        if not shapely.intersects(self.area, shapely.box(*self._bounds(window))):
            return np.zeros(shape, np.bool_)
        part = self.grid[window.slices]
        mask: np.ndarray = rasterio.features.geometry_mask([self.area], shape, part.affine, invert=True)
        return mask

    @property
    def area_km2(self) -> float:
        """Return the size of the area inside the grid, or of the grid."""
        whole = shapely.box(*self.grid.boundingbox)
        return float((whole if self.area is None else self.area.intersection(whole)).area / 1e6)

    @property
    def fingerprint(self) -> str | None:
        """Return the checksum of the area."""
        return None if self.area is None else hashlib.sha256(shapely.to_wkb(self.area)).hexdigest()

    def _bounds(self, window: Window) -> tuple[float, float, float, float]:
        a = self.grid.affine
        left, top = a @ (window.col, window.row)
        right, bottom = a @ (window.col + window.width, window.row + window.height)
        return left, bottom, right, top


def _touching(seen: np.ndarray, bounds: tuple[float, float, float, float]) -> np.ndarray:
    left, bottom, right, top = bounds
    return (seen[:, 0] < right) & (seen[:, 2] > left) & (seen[:, 1] < top) & (seen[:, 3] > bottom)
