"""Which places a pretraining corpus shows, and when."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pyogrio
import shapely
from affine import Affine
from jaxtyping import Bool, Float, Int
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from pyproj import Transformer

from panterra.errors import InputError
from panterra.imagery.labels import LATITUDES, LONGITUDES

CELL_M = 2560
PARENT_CELLS = 16
"""Cells along the side of a parent tile: 256 pixels of 160 m."""
LATITUDE_RANGE = (-80.0, 84.0)
"""Where UTM is defined."""
FIRST_DAY, LAST_DAY = dt.date(2016, 6, 1), dt.date(2024, 6, 1)
"""Between which the published corpus draws its centres."""
DATE_COLUMNS = ("date", "time", "datetime", "centre", "center")
_STEP_DEG = 0.001  # how closely a geometry is followed; a tenth of a degree-square cell is 111 m or less
_LATTICE_DEG = 0.018  # 2.0 km: a square of 2.56 km holds a point of such a lattice, however it is turned


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """A square of 2,560 m: x from 2560 col eastwards, y from -2560 row southwards, in metres of a UTM zone."""

    epsg: int
    col: int
    row: int

    @property
    def name(self) -> str:
        return f"{self.epsg}_{self.col}_{self.row}"

    def box(self, pixel_m: float = 10.0) -> GeoBox:
        """Return its grid of pixels."""
        side = round(CELL_M / pixel_m)
        corner = Affine(pixel_m, 0, CELL_M * self.col, 0, -pixel_m, -CELL_M * self.row)
        return GeoBox((side, side), corner, CRS(f"EPSG:{self.epsg}"))

    def parent(self, cells: int = PARENT_CELLS) -> str:
        """Name the square of `cells` x `cells` cells that it lies in."""
        return f"{self.epsg}_{self.col // cells}_{self.row // cells}"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Window:
    """A cell and the middle of the year that is shown of it."""

    cell: Cell
    centre: dt.date
    categories: tuple[str, ...] = ()
    """Of OpenStreetMap, for which the cell was drawn."""

    @property
    def name(self) -> str:
        return f"{self.cell.name}_{self.centre}"


def parse_cell(name: str) -> Cell:
    """Read a name such as "32633_186_-2068"."""
    found = re.fullmatch(r"(32[67]\d\d)_(-?\d+)_(-?\d+)", name)
    if found is None:
        raise InputError(f"{name!r} is not the name of a cell; wanted <EPSG of a UTM zone>_<col>_<row>")
    epsg, col, row = map(int, found.groups())
    return Cell(epsg=epsg, col=col, row=row)


# From places to cells


def cells_at(lonlat: Float[np.ndarray, "n 2"]) -> list[Cell]:
    """Return the cell of each place, in the UTM zone that the place lies in."""
    lonlat = np.asarray(lonlat, np.float64).reshape(-1, 2)
    _refuse_outside_utm(lonlat)
    return [Cell(epsg=int(e), col=int(c), row=int(r)) for e, c, r in _cell_numbers(lonlat)]


def cells_touched(
    geometries: Sequence[shapely.Geometry] | np.ndarray, groups: Int[np.ndarray, " n"] | None = None
) -> tuple[Int[np.ndarray, " m"], list[Cell]]:
    """List the cells that geometries in degrees reach, with the number of the geometry or of its group, each pair once.

    Parts outside UTM are left out. Outlines are followed in steps of 0.001 degrees, so a cell of which only a corner is
    cut may be missed.
    """
    geometries = np.asarray(geometries, dtype=object)
    kinds = shapely.get_type_id(geometries)
    lonlat, owner = shapely.get_coordinates(shapely.segmentize(geometries, _STEP_DEG), return_index=True)
    inner = [
        (number, _lattice(geometries[number]))
        for number in np.flatnonzero(np.isin(kinds, (3, 6, 7)))
        if np.ptp(shapely.bounds(geometries[number]).reshape(2, 2), axis=0).max() > _LATTICE_DEG
    ]
    lonlat = np.concatenate([lonlat, *(places for _, places in inner)])
    owner = np.concatenate([owner, *(np.full(len(places), number) for number, places in inner)])
    kept = _in_utm(lonlat)
    owner = owner if groups is None else groups[owner]
    found = np.unique(np.column_stack([owner[kept], _cell_numbers(lonlat[kept])]), axis=0)
    return found[:, 0], [Cell(epsg=int(e), col=int(c), row=int(r)) for _, e, c, r in found]


def _lattice(geometry: shapely.Geometry) -> Float[np.ndarray, "n 2"]:
    west, south, east, north = geometry.bounds
    x, y = np.meshgrid(np.arange(west, east, _LATTICE_DEG), np.arange(south, north, _LATTICE_DEG))
    shapely.prepare(geometry)
    inside = shapely.contains_xy(geometry, x, y)
    return np.column_stack([x[inside], y[inside]])


def _in_utm(lonlat: Float[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    south, north = LATITUDE_RANGE
    inside: np.ndarray = (np.abs(lonlat[:, 0]) <= 180) & (lonlat[:, 1] >= south) & (lonlat[:, 1] <= north)
    return inside


def _refuse_outside_utm(lonlat: Float[np.ndarray, "n 2"]) -> None:
    wrong = lonlat[~_in_utm(lonlat)]
    if len(wrong):
        raise InputError(
            f"longitude {wrong[0, 0]:g}, latitude {wrong[0, 1]:g} is outside UTM; "
            "give degrees from -180 to 180 and -80 to 84"
        )


def _cell_numbers(lonlat: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 3"]:
    zone = np.floor((lonlat[:, 0] + 180) / 6).astype(np.int64) % 60 + 1
    epsg = np.where(lonlat[:, 1] >= 0, 32600, 32700) + zone
    out = np.empty((len(lonlat), 3), np.int64)
    out[:, 0] = epsg
    for code in np.unique(epsg):
        here = epsg == code
        x, y = _transformer(4326, int(code)).transform(*lonlat[here].T)
        # Floors, where the published grid cuts towards zero, which makes the cells around zero twice as wide.
        out[here, 1], out[here, 2] = np.floor(x / CELL_M), np.floor(-y / CELL_M)
    return out


@lru_cache(maxsize=256)
def _transformer(source: int, target: int) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def outlines(cells: Sequence[Cell]) -> np.ndarray:
    """Return cells as polygons in degrees; one across the 180th meridian reaches beyond 180."""
    corners = np.empty((len(cells), 5, 2))
    numbers = np.array([(c.epsg, c.col, c.row) for c in cells], np.int64).reshape(-1, 3)
    steps = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
    for code in np.unique(numbers[:, 0]):
        here = numbers[:, 0] == code
        x = CELL_M * (numbers[here, 1, None] + steps[:, 0])
        y = -CELL_M * (numbers[here, 2, None] + steps[:, 1])
        corners[here] = np.stack(_transformer(int(code), 4326).transform(x, y), axis=-1)
    across = np.ptp(corners[..., 0], axis=1) > 180
    corners[across, :, 0] %= 360
    polygons: np.ndarray = shapely.polygons(corners)
    return polygons


def read_places(path: str | Path) -> list[tuple[Cell, dt.date | None]]:
    """Read the cells of points or polygons (CSV with lon and lat, GeoParquet, anything GDAL reads), each once.

    A column `date` (YYYY-MM-DD) says around which day a place is shown; without, that is drawn.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}")
    table = _read_table(path)
    by_name = {str(name).lower(): name for name in table.columns}
    dated = next((by_name[name] for name in DATE_COLUMNS if name in by_name), None)
    days: list[dt.date | None] = [None] * len(table)
    if dated is not None:
        try:
            days = [None if pd.isna(day) else pd.Timestamp(day).date() for day in table[dated]]
        except (ValueError, TypeError) as error:
            raise InputError(f"column {dated!r} of {path} holds what is no date: {error}; write YYYY-MM-DD") from None
    owner, cells = cells_touched(table.geometry.to_numpy())
    found = dict.fromkeys((cell, days[number]) for number, cell in zip(owner, cells, strict=True))
    if not found:
        raise InputError(f"{path} holds no place within UTM; wanted points or polygons, or rows with lon and lat")
    return list(found)


def _read_table(path: Path) -> gpd.GeoDataFrame:
    """Read rows with a geometry in degrees; those without are left out."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv", ".txt"):
            return _points(pd.read_csv(path, sep=None, engine="python"), path)
        if suffix in (".parquet", ".pq", ".geoparquet"):
            if b"geo" not in (pq.read_schema(path).metadata or {}):
                return _points(pd.read_parquet(path), path)
            frame = gpd.read_parquet(path)
        else:
            frame = pyogrio.read_dataframe(path)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, OSError, ValueError) as error:
        raise InputError(f"cannot read places from {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(frame, gpd.GeoDataFrame):
        raise InputError(f"{path} has no geometries; places need them, or a CSV with lon and lat")
    frame = frame[frame.geometry.notna()]
    return frame if frame.crs is None else frame.to_crs(4326)


def _points(table: pd.DataFrame, path: Path) -> gpd.GeoDataFrame:
    by_name = {str(name).lower(): name for name in table.columns}
    lon, lat = (next((by_name[n] for n in names if n in by_name), None) for names in (LONGITUDES, LATITUDES))
    if lon is None or lat is None:
        raise InputError(f"{path} has the columns {', '.join(map(str, table.columns))}; it needs lon and lat")
    lonlat = table[[lon, lat]].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    _refuse_outside_utm(lonlat)
    return gpd.GeoDataFrame(table, geometry=shapely.points(lonlat))


# Choosing


def draw_cells(by_category: Mapping[str, Collection[Cell]], most: int, *, seed: int) -> dict[Cell, tuple[str, ...]]:
    """Draw at most `most` cells of each category; return their union and what each was drawn for.

    What is drawn of a category does not depend on the others, so a new one leaves the rest as it is.
    """
    if most < 1:
        raise InputError(f"{most} cells per category were asked for; wanted 1 or more")
    drawn: dict[Cell, tuple[str, ...]] = {}
    for category in sorted(by_category):
        cells = sorted(by_category[category])
        if len(cells) > most:
            rng = np.random.default_rng([seed, zlib.crc32(category.encode())])
            cells = [cells[i] for i in np.sort(rng.choice(len(cells), most, replace=False))]
        for cell in cells:
            drawn[cell] = (*drawn.get(cell, ()), category)
    return dict(sorted(drawn.items()))


def draw_centre(cell: Cell, first: dt.date, last: dt.date, *, seed: int) -> dt.date:
    """Draw a day, both ends included; all cells of a parent tile get the same."""
    if last < first:
        raise InputError(f"the last day {last} is before the first, {first}; swap them")
    return first + dt.timedelta(days=_number(f"{seed} {cell.parent()}") % ((last - first).days + 1))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# Splits


def spatial_groups(cells: Sequence[Cell], *, parent_cells: int = PARENT_CELLS) -> list[str]:
    """Name the group of each cell: its parent tile, joined with those of other UTM zones whose cells overlap its own.

    So no ground is in two groups, where zones meet neither.
    """
    root = {parent: parent for parent in sorted({cell.parent(parent_cells) for cell in cells})}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    for one, other, _ in overlaps(cells):
        a, b = sorted((find(cells[one].parent(parent_cells)), find(cells[other].parent(parent_cells))))
        root[b] = a
    return [find(cell.parent(parent_cells)) for cell in cells]


def overlaps(cells: Sequence[Cell]) -> list[tuple[int, int, float]]:
    """List the pairs of cells of different zones that share ground, and how much of the first is shared."""
    shapes = outlines(cells)
    first, second = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    pairs = [
        (a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True) if a < b and cells[a].epsg != cells[b].epsg
    ]
    if not pairs:
        return []
    a, b = np.array(pairs).T
    shares = shapely.area(shapely.intersection(shapes[a], shapes[b])) / shapely.area(shapes[a])
    return [(*pair, float(share)) for pair, share in zip(pairs, shares, strict=True) if share > 0]


def split_cells(
    cells: Iterable[Cell], shares: Mapping[str, float], *, seed: int, parent_cells: int = PARENT_CELLS
) -> dict[Cell, str]:
    """Deal cells into splits of about the given shares, whole spatial groups at a time."""
    unique = sorted(set(cells))
    wanted = {name: share for name, share in shares.items() if share > 0}
    if not wanted or min(shares.values()) < 0:
        raise InputError(f"splits {dict(shares)} came; wanted names with shares above 0, such as train=0.9 val=0.1")
    members: dict[str, list[Cell]] = {}
    for cell, group in zip(unique, spatial_groups(unique, parent_cells=parent_cells), strict=True):
        members.setdefault(group, []).append(cell)
    if len(members) < len(wanted):
        raise InputError(
            f"{len(wanted)} splits need as many blocks of {parent_cells * CELL_M / 1000:g} km, but the cells "
            f"({len(unique)}) lie in {len(members)}; take smaller blocks, fewer splits or cells from more places"
        )
    total = sum(wanted.values())
    filled = dict.fromkeys(wanted, 0)
    out: dict[Cell, str] = {}
    left = len(members)
    for group in sorted(members, key=lambda name: _number(f"{seed} {name}")):
        empty = [name for name in wanted if not filled[name]]
        # Every split gets a group; beyond that the one that lacks most of its share.
        among = empty if len(empty) == left else list(wanted)
        done = sum(filled.values()) + len(members[group])
        chosen = max(among, key=lambda name: wanted[name] / total * done - filled[name])
        filled[chosen] += len(members[group])
        left -= 1
        out |= dict.fromkeys(members[group], chosen)
    return dict(sorted(out.items()))
