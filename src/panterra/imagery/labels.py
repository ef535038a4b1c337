"""What people know about places."""

from __future__ import annotations

import colorsys
import datetime as dt
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow
import pyogrio
import shapely
from odc.geo.geobox import GeoBox
from pandas.api.types import is_bool_dtype, is_float_dtype, is_numeric_dtype

from panterra.errors import InputError
from panterra.imagery.raster import Colour, crs_for_rasterio, dtype_of, grid_of, read_legend, read_onto

Kind = Literal["classes", "values"]

COLUMNS = (
    *("class", "class_name", "classname", "label", "lulc", "lulc_name", "landcover", "land_cover", "landuse"),
    *("land_use", "lc", "lucode", "crop", "crop_type", "croptype", "croptype_label", "landcover_label", "species"),
    *("habitat", "target", "value", "category", "lulc_id", "class_id", "ewoc_code", "es_label"),
)
"""Names under which the class or value usually stands, the likeliest first; case does not matter."""

LONGITUDES = ("lon", "longitude", "lng", "long", "x")
LATITUDES = ("lat", "latitude", "y")

STARTS = ("start_time", "start_date", "date_start", "start", "begin", "oe_start_time", "es_start_time")
ENDS = ("end_time", "end_date", "date_end", "end", "oe_end_time", "es_end_time")

NEAR = pd.Timedelta(days=31)
"""How far a label's time may lie from the imagery's: what an image of a month stands for."""

MAX_NUMBERED = 64
"""Whole numbers with at most as many different values are taken for class codes, others for values."""

RASTERS = (".tif", ".tiff", ".vrt", ".img", ".jp2")

BLOCK_PX = 2048
"""Side of the part of a label raster that is read at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Places and what is there."""

    frame: gpd.GeoDataFrame
    """A geometry and `target` per feature: the number of its class in `names`, or its value. Empty for a raster."""
    kind: Kind
    names: tuple[str, ...] = ()
    """Of the classes, in the order of their codes or of the alphabet."""
    colours: tuple[Colour, ...] = ()
    """One per class."""
    raster: Path | None = None
    """The file that holds the labels, where they are pixels."""
    codes: tuple[float, ...] = ()
    """Pixel value of each class of a raster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSamples:
    """Labelled cells of a grid, by row and column."""

    row: npt.NDArray[np.int64]
    col: npt.NDArray[np.int64]
    target: npt.NDArray[Any]
    """int64 class numbers or float32 values."""
    group: npt.NDArray[np.int64]
    """Which feature a cell came from; the cells of a polygon belong together. Each cell of a raster is its own."""
    xy: npt.NDArray[np.float64]
    """Centres of the cells in the CRS of the grid."""
    conflicts: int = 0
    """Cells left out because features of different classes claim them."""

    def __len__(self) -> int:
        return len(self.row)


def read_labels(
    path: str | Path, *, column: str | None = None, layer: str | None = None, kind: Kind | None = None
) -> Labels:
    """Read points or polygons with a class or value (GeoJSON, GPKG, Shapefile, GeoParquet, CSV with lon and lat, ...),
    or a raster of classes or values.

    The column is one of `COLUMNS` unless named, or the only field of OlmoEarth's `oe_labels`. Text is a class, a
    fraction a value, whole numbers are classes while they are few (`MAX_NUMBERED`), unless `kind` says which. Features
    without geometry or target are left out, and pixels of a raster of classes that are nodata or below zero.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if path.suffix.lower() in RASTERS:
        return _raster_labels(path, kind)
    frame, fields = _annotated(_with_crs(_read_frame(path, layer), path))
    column = _column(frame, column or (fields[0] if len(fields) == 1 else None), path)
    if frame[column].map(lambda value: isinstance(value, list | dict | np.ndarray)).any():
        raise InputError(f"{column!r} of {path} holds lists; wanted one class or value for each feature")
    frame = frame[frame.geometry.notna() & ~frame.geometry.is_empty & frame[column].notna() & (frame[column] != "")]
    if frame.empty:
        raise InputError(f"{path} has no feature with both a geometry and a value in {column!r}")
    odd = set(frame.geom_type) - {"Point", "MultiPoint", "Polygon", "MultiPolygon"}
    if odd:
        raise InputError(f"{path} holds {', '.join(sorted(odd))}; labels are points or polygons: buffer the lines")
    frame = frame.reset_index(drop=True)
    given = frame[column]
    if kind is None:
        kind = "values" if _is_values(given) else "classes"
    if kind == "values":
        try:
            target: npt.NDArray[Any] = given.to_numpy(np.float32)
        except (TypeError, ValueError):
            raise InputError(f"{column!r} of {path} holds text such as {given.iloc[0]!r}, not values") from None
        return Labels(frame=frame.assign(target=target), kind=kind)
    known = sorted(given.unique())
    target = given.map({name: number for number, name in enumerate(known)}).to_numpy(np.int64)
    frame = frame.assign(target=target)
    return Labels(
        frame=frame,
        kind=kind,
        names=tuple(_spell(name) for name in known),
        colours=_stated_colours(frame, len(known)) or distinct_colours(len(known)),
    )


def of_dates(labels: Labels, dates: Sequence[dt.date]) -> tuple[Labels, int]:
    """Leave out and count labels whose start or end shows that they are of another time; see `fits_dates`."""
    kept = fits_dates(labels, dates)
    if kept.all():
        return labels, 0
    return picked(labels, kept), int((~kept).sum())


def picked(labels: Labels, which: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Labels:
    """Keep some features, by truth or by number."""
    return replace(labels, frame=labels.frame.iloc[which].reset_index(drop=True))


def fits_dates(labels: Labels, dates: Sequence[dt.date]) -> npt.NDArray[np.bool_]:
    """Tell of each feature whether its start and end, where it tells them, suit imagery of these dates.

    They do not where the one is more than `NEAR` after the last of the dates, or the other before the first. Columns
    are those of `STARTS` and `ENDS`.
    """
    starts, ends = (_times(labels.frame, names) for names in (STARTS, ENDS))
    if not len(dates) or (starts is None and ends is None):
        return np.ones(len(labels.frame), np.bool_)
    first, last = (pd.Timestamp(day, tz="UTC") for day in (min(dates), max(dates)))
    late = np.zeros(len(labels.frame), np.bool_) if starts is None else (starts > last + NEAR).to_numpy()
    early = np.zeros(len(labels.frame), np.bool_) if ends is None else (ends < first - NEAR).to_numpy()
    return ~(late | early)


def sample_labels(labels: Labels, box: GeoBox) -> LabelSamples:
    """Find the cells of a grid that hold a point or whose centre lies in a polygon, in the order of rows and columns.

    A cell that several features give the same class counts once, for the first of them; where they disagree it is left
    out. Several values in a cell are averaged.
    """
    if labels.raster is not None:
        return _sample_raster(labels, box)
    frame = labels.frame.to_crs(crs_for_rasterio(box.crs).to_wkt())
    found = [_cells(geometry, box) for geometry in frame.geometry]
    group = np.repeat(np.arange(len(found)), [len(cells) for cells in found])
    cells = np.concatenate([*found, np.empty(0, np.int64)])
    target = frame["target"].to_numpy()[group]
    # Sorting is stable, so the first feature stays first in its cell.
    order = np.argsort(cells, kind="stable")
    cells, group, target = cells[order], group[order], target[order]
    unique, first, which = np.unique(cells, return_index=True, return_inverse=True)
    if labels.kind == "values":
        target = (np.bincount(which, target) / np.bincount(which)).astype(np.float32) if len(which) else target
        return _samples(box, unique, target, group[first])
    agreed = np.ones(len(unique), np.bool_)
    agreed[which[target != target[first][which]]] = False
    samples = _samples(box, unique[agreed], target[first][agreed], group[first][agreed])
    return replace(samples, conflicts=int((~agreed).sum()))


def distinct_colours(count: int) -> tuple[Colour, ...]:
    """Return colours that are easy to tell apart: hues a golden angle apart, in two shades."""
    hues = [(0.58 + number * 0.618034) % 1 for number in range(count)]
    shades = [(0.65, 0.85) if number % 2 == 0 else (0.85, 0.6) for number in range(count)]
    mixed = [colorsys.hsv_to_rgb(hue, *shade) for hue, shade in zip(hues, shades, strict=True)]
    return tuple((round(r * 255), round(g * 255), round(b * 255)) for r, g, b in mixed)


def _read_frame(path: Path, layer: str | None) -> gpd.GeoDataFrame:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".txt", ".tsv"):
        return _from_table(_read_table(path), path)
    try:
        if suffix in (".parquet", ".geoparquet", ".pq"):
            try:
                return gpd.read_parquet(path)
            except ValueError:
                return _from_table(pd.read_parquet(path), path)
        layers = [str(name) for name in pyogrio.list_layers(path)[:, 0]]
        if layer is not None and layer not in layers:
            raise InputError(f"{path} has no layer {layer!r}; it has {', '.join(layers)}")
        if layer is None and len(layers) > 1:
            raise InputError(f"{path} has the layers {', '.join(layers)}; give a file of one layer (in Python: layer=)")
        frame = gpd.read_file(path, layer=layer)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, pyarrow.ArrowInvalid) as error:
        reason = str(error).splitlines()[0].split(";")[0]
        raise InputError(f"cannot read labels from {path}: {reason}; wanted points or polygons") from error
    if not isinstance(frame, gpd.GeoDataFrame):
        raise InputError(f"{path} has no geometries; labels need places")
    return frame


def _read_table(path: Path) -> pd.DataFrame:
    """Read text in columns: separators, and commas for points, are told by the first two lines."""
    try:
        with path.open(encoding="utf-8-sig") as text:
            head, first = text.readline(), text.readline()
        separator = max(",;\t|", key=head.count)
        decimal = "," if separator != "," and re.search(r"\d,\d", first) else "."
        separator = separator if separator in head else r"\s+"
        return pd.read_csv(path, sep=separator, decimal=decimal, encoding="utf-8-sig", low_memory=False)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; save the table as CSV in UTF-8") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path} is no table: {' '.join(str(error).split())}; wanted CSV with lon and lat") from None


def _annotated(frame: gpd.GeoDataFrame) -> tuple[gpd.GeoDataFrame, list[str]]:
    """Make columns of the fields of OlmoEarth's annotations, `oe_labels: {field: number}`; name them."""
    if "oe_labels" not in frame or not frame["oe_labels"].map(lambda value: isinstance(value, str | dict)).all():
        return frame, []
    try:
        stated = [json.loads(value) if isinstance(value, str) else value for value in frame["oe_labels"]]
        fields = pd.DataFrame(stated, index=frame.index)
    except (ValueError, TypeError):
        return frame, []
    return frame.drop(columns="oe_labels").assign(**fields), [str(name) for name in fields.columns]


def _times(frame: gpd.GeoDataFrame, names: Sequence[str]) -> pd.Series[Any] | None:
    """Read the first column of one of the names that tells times; NaT where it does not."""
    by_name = {str(name).lower(): name for name in frame.columns}
    for name in names:
        if name in by_name and not is_numeric_dtype(frame[by_name[name]].dtype):
            told: pd.Series[Any] = pd.to_datetime(frame[by_name[name]], errors="coerce", utc=True, format="ISO8601")
            if told.notna().any():
                return told
    return None


def _from_table(table: pd.DataFrame, path: Path) -> gpd.GeoDataFrame:
    """Make points of rows with longitude and latitude."""
    by_name = {str(name).lower(): name for name in table.columns}
    lon = next((by_name[name] for name in LONGITUDES if name in by_name), None)
    lat = next((by_name[name] for name in LATITUDES if name in by_name), None)
    if lon is None or lat is None:
        raise InputError(f"{path} has the columns {_listed(table)}; it needs lon and lat in degrees")
    x, y = (pd.to_numeric(table[name], errors="coerce") for name in (lon, lat))
    if (x.abs() > 360).any() or (y.abs() > 90).any():
        raise InputError(f"{lon!r} and {lat!r} of {path} are not degrees; give longitude and latitude")
    known = x.notna() & y.notna()
    points = gpd.points_from_xy(x[known], y[known], crs="EPSG:4326")
    return gpd.GeoDataFrame(table[known].drop(columns=["geometry"], errors="ignore"), geometry=points)


def _with_crs(frame: gpd.GeoDataFrame, path: Path) -> gpd.GeoDataFrame:
    if frame.crs is None:
        raise InputError(f"{path} does not say its coordinate reference system; add it, for a Shapefile as .prj")
    return frame


def _column(frame: gpd.GeoDataFrame, asked: str | None, path: Path) -> str:
    columns = [str(name) for name in frame.columns if name != frame.geometry.name]
    if asked is not None:
        if asked not in columns:
            raise InputError(f"{path} has no column {asked!r}; it has {', '.join(columns)}")
        return asked
    by_name = {name.lower(): name for name in reversed(columns)}
    for name in COLUMNS:
        if name in by_name:
            return by_name[name]
    if len(columns) == 1:
        return columns[0]
    raise InputError(
        f"{path} has the columns {', '.join(columns)}; say with --column (column= in Python) which holds the class "
        "or value"
    )


def _is_values(given: pd.Series[Any]) -> bool:
    if is_bool_dtype(given.dtype) or not is_numeric_dtype(given.dtype):
        return False
    whole = not is_float_dtype(given.dtype) or bool((given % 1 == 0).all())
    return not whole or given.nunique() > MAX_NUMBERED


def _spell(name: Any) -> str:
    return str(int(name)) if isinstance(name, float) and name.is_integer() else str(name)


def _stated_colours(frame: gpd.GeoDataFrame, count: int) -> tuple[Colour, ...]:
    """Take the colours of a column of #rrggbb, where every class has one."""
    column = next((name for name in frame.columns if str(name).lower() in ("colour", "color", "colour_hex")), None)
    if column is None:
        return ()
    texts = frame.groupby("target")[column].first().astype(str)
    if len(texts) != count or not texts.str.fullmatch(r"#[0-9a-fA-F]{6}").all():
        return ()
    return tuple((int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)) for text in texts)


def _cells(geometry: shapely.Geometry, box: GeoBox) -> npt.NDArray[np.int64]:
    """Number the cells (row by row) that a geometry in the CRS of the box hits."""
    height, width = box.shape
    if not np.isfinite(geometry.bounds).all():
        # It lies off the map projection of the box.
        return np.empty(0, np.int64)
    if geometry.geom_type in ("Point", "MultiPoint"):
        xy = shapely.get_coordinates(geometry)
        col, row = (np.floor(n).astype(np.int64) for n in _to_pixels(xy[:, 0], xy[:, 1], box))
    else:
        west, south, east, north = geometry.bounds
        corners = _to_pixels(np.array([west, east, west, east]), np.array([south, south, north, north]), box)
        (left, top), (right, bottom) = (np.floor([n.min() for n in corners]), np.ceil([n.max() for n in corners]))
        cols = np.arange(max(left, 0), min(right, width), dtype=np.int64)
        rows = np.arange(max(top, 0), min(bottom, height), dtype=np.int64)
        row, col = (n.ravel() for n in np.meshgrid(rows, cols, indexing="ij"))
        shapely.prepare(geometry)
        centres = _centres(row, col, box)
        inside = shapely.contains_xy(geometry, centres[:, 0], centres[:, 1])
        row, col = row[inside], col[inside]
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    return np.unique(row[inside] * width + col[inside])


def _to_pixels(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], box: GeoBox
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    to = ~box.affine
    return to.a * x + to.b * y + to.c, to.d * x + to.e * y + to.f


def _centres(row: npt.NDArray[np.int64], col: npt.NDArray[np.int64], box: GeoBox) -> npt.NDArray[np.float64]:
    to = box.affine
    return np.stack(
        [to.a * (col + 0.5) + to.b * (row + 0.5) + to.c, to.d * (col + 0.5) + to.e * (row + 0.5) + to.f], axis=1
    )


def _samples(
    box: GeoBox, cells: npt.NDArray[np.int64], target: npt.NDArray[Any], group: npt.NDArray[np.int64]
) -> LabelSamples:
    row, col = np.divmod(cells, box.shape.x)
    return LabelSamples(row=row, col=col, target=target, group=group, xy=_centres(row, col, box))


def _raster_labels(path: Path, kind: Kind | None) -> Labels:
    names, palette = read_legend(path)
    empty = gpd.GeoDataFrame({"target": []}, geometry=[], crs="EPSG:4326")
    found: set[float] = set()
    whole = bool(names) or np.issubdtype(dtype_of(path), np.integer)
    if kind == "values" or (kind is None and not whole):
        return Labels(frame=empty, kind="values", raster=path)
    for part in _blocks(grid_of(path)):
        values, valid = read_onto(path, part, bands=[1], categorical=True)
        found |= {value for value in np.unique(values[valid]).tolist() if value >= 0 or value in names}
        if len(found) > MAX_NUMBERED and kind is None and not names:
            return Labels(frame=empty, kind="values", raster=path)
    if not found:
        raise InputError(f"{path} holds no valid pixel of a class; labels need some")
    codes = tuple(sorted(found))
    spare = distinct_colours(len(codes))
    return Labels(
        frame=empty,
        kind="classes",
        names=tuple(names.get(int(code), _spell(code)) for code in codes),
        colours=tuple(palette.get(int(code), spare[number]) for number, code in enumerate(codes)),
        raster=path,
        codes=codes,
    )


def _sample_raster(labels: Labels, box: GeoBox) -> LabelSamples:
    assert labels.raster is not None
    values, valid = read_onto(labels.raster, box, bands=[1], categorical=labels.kind == "classes")
    if labels.kind == "classes":
        valid = valid & np.isin(values, np.array(labels.codes, np.float32))
    cells = np.flatnonzero(valid[0]).astype(np.int64)
    target: npt.NDArray[Any] = values[0].ravel()[cells]
    if labels.kind == "classes":
        target = np.searchsorted(np.array(labels.codes, np.float32), target).astype(np.int64)
    return _samples(box, cells, target, np.arange(len(cells), dtype=np.int64))


def _blocks(box: GeoBox) -> Sequence[GeoBox]:
    height, width = box.shape
    return [
        box[row : min(row + BLOCK_PX, height), col : min(col + BLOCK_PX, width)]
        for row in range(0, height, BLOCK_PX)
        for col in range(0, width, BLOCK_PX)
    ]


def _listed(table: pd.DataFrame) -> str:
    return ", ".join(str(name) for name in table.columns)
