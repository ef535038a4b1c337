"""Embeddings as a table of chips: GeoParquet."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.files import unfinished
from panterra.mapping.embeddings import (
    INT8_RULE,
    NO_BYTE,
    Block,
    Dtype,
    EmbeddingStore,
    dates_of,
    from_bytes,
    ground_of,
    proj_fields,
    to_bytes,
)
from panterra.mapping.passport import data_asset, passport_of, write_passport
from panterra.mapping.tiles import Window

SUFFIXES = (".parquet", ".geoparquet")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chips:
    """Chips of an area, a row for each that has data, opened for reading."""

    path: Path
    box: GeoBox
    """One cell per chip."""
    dim: int
    dtype: Dtype
    about: Mapping[str, Any]
    """As of the store that they come from; patch_m is the side of the store's patches."""
    num_rows: int
    side: int
    """Patches along the side of a chip."""

    def __len__(self) -> int:
        return self.num_rows

    @property
    def dates(self) -> list[dt.date]:
        """Of the inputs, earliest first."""
        return dates_of(self.about)

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """Go through all chips as stored, a row group at a time, from one on."""
        with pq.ParquetFile(self.path) as file:
            for number in range(first, file.num_row_groups):
                rows = file.read_row_group(number, columns=["row", "col", "embedding"])
                yield Block(codes=_vectors(rows, self.dim).T, cells=self._cells(rows))

    def sample(self, row: np.ndarray, col: np.ndarray) -> np.ndarray:
        """Read the features of single chips, float32 [n, D]; NaN where there is none."""
        wanted = np.asarray(row) * self.box.shape[1] + np.asarray(col)
        result = np.full((len(wanted), self.dim), np.nan, np.float32)
        columns = ["row", "col", "embedding", *(["scale_exponent"] if self.dtype == "int8" else [])]
        with pq.ParquetFile(self.path) as file:
            for number in range(file.num_row_groups):
                if not _overlaps(file.metadata.row_group(number), row, col):
                    continue
                rows = file.read_row_group(number, columns=columns)
                cells = self._cells(rows)
                order = np.argsort(cells)
                place = order[np.searchsorted(cells, wanted, sorter=order).clip(max=len(cells) - 1)]
                here = cells[place] == wanted
                values = _vectors(rows, self.dim)[place[here]]
                if self.dtype == "int8":
                    values = from_bytes(values, rows["scale_exponent"].to_numpy()[place[here]])
                result[here] = values
        return result

    def _cells(self, rows: pa.Table) -> np.ndarray:
        cells: np.ndarray = rows["row"].to_numpy().astype(np.int64) * self.box.shape[1] + rows["col"].to_numpy()
        return cells


def is_chips(path: str | Path) -> bool:
    """Tell by the name whether a file is a table of chips."""
    return Path(path).suffix.lower() in SUFFIXES


def open_chips(path: str | Path) -> Chips:
    """Open what `write_chips` wrote."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    found = pq.read_metadata(path)
    note = found.metadata or {}
    if b"panterra:chips" not in note:
        raise InputError(f"{path} holds no chips; wanted a GeoParquet file that `panterra chips` wrote")
    about = json.loads(note[b"panterra:chips"])
    return Chips(
        path=path,
        box=GeoBox(about["shape"], Affine(*about["transform"]), pyproj.CRS.from_user_input(about["crs"])),
        dim=about["dim"],
        dtype=about["dtype"],
        about=about["embeddings"],
        num_rows=found.num_rows,
        side=about["side"],
    )


def write_chips(
    store: EmbeddingStore,
    out: str | Path,
    *,
    side: int = 1,
    country: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Chips:
    """Write a store as GeoParquet: a row for each chip of `side` x `side` patches that has data.

    Columns: geometry (WKB, the chip's square in the store's CRS), bbox (its covering), embedding (a list of D numbers
    of the store's type), of int8 scale_exponent, row, col, start_datetime, end_datetime, model, patch_m. A chip of
    several patches holds the mean of those with data. A row group is a rectangle of ground. The file's metadata hold
    `geo` (GeoParquet 1.1) and `emb` (STAC's embedding extension, with the rule of int8); a passport is written beside.
    """
    out = Path(out)
    if not is_chips(out):
        raise InputError(f"chips are written as GeoParquet; let the name {out.name!r} end in .parquet")
    if side < 1:
        raise InputError(f"chips of {side} patches were asked for; wanted 1 or more along the side")
    grid = chip_grid(store.box, side)
    schema = _schema(store, grid, side)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        measure_energy(country=country) as meter,
        unfinished(out) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        windows = store.windows(multiple=side)
        for number, window in enumerate(windows, start=1):
            rows = _rows(store, window, side, grid, schema)
            if rows.num_rows:
                writer.write_table(rows, row_group_size=rows.num_rows)
            if progress:
                progress(number, len(windows))
    asset = data_asset(out, "application/vnd.apache.parquet", data_type=store.dtype)
    write_passport(
        passport_of(out),
        grid,
        store.dates,
        {"embeddings": asset},
        energy=meter.report,
        licence=store.about.get("licence"),
        properties={**_extension(store, side), "panterra:model": store.about.get("model")},
    )
    return open_chips(out)


def chip_grid(box: GeoBox, side: int) -> GeoBox:
    """Lay chips over a grid of patches from its upper left corner; the last ones may reach beyond it."""
    height, width = (-(-n // side) for n in box.shape)
    return GeoBox((height, width), box.affine @ Affine.scale(side), box.crs)


def _rows(store: EmbeddingStore, window: Window, side: int, grid: GeoBox, schema: pa.Schema) -> pa.Table:
    if side == 1:
        codes, exponent = store.stored(window)
        codes = np.moveaxis(codes, 0, -1)
        seen = np.isfinite(codes).all(-1) if exponent is None else exponent != NO_BYTE
    else:
        means = _means(store.read(window), side)
        seen = np.isfinite(means).all(-1)
        codes, exponent = to_bytes(means) if store.dtype == "int8" else (means.astype(store.dtype), None)
    row, col = (n + at // side for n, at in zip(np.nonzero(seen), (window.row, window.col), strict=True))
    x, y = ground_of(row, col, grid)
    beyond_x, beyond_y = ground_of(row + 1, col + 1, grid)
    corners = [np.minimum(x, beyond_x), np.minimum(y, beyond_y), np.maximum(x, beyond_x), np.maximum(y, beyond_y)]
    dates, count = store.dates, len(row)
    columns: dict[str, Any] = {
        "geometry": shapely.to_wkb(shapely.box(*corners)),
        "bbox": pa.StructArray.from_arrays([pa.array(c, pa.float64()) for c in corners], names=CORNERS),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(codes[seen]).ravel()), type=schema.field("embedding").type
        ),
        "row": row.astype(np.int32),
        "col": col.astype(np.int32),
        "start_datetime": [dt.datetime.combine(dates[0], dt.time.min, dt.UTC) if dates else None] * count,
        "end_datetime": [dt.datetime.combine(dates[-1], dt.time(23, 59, 59), dt.UTC) if dates else None] * count,
        "model": [_model_name(store.about)] * count,
        "patch_m": np.full(count, store.about["patch_m"], np.float64),
    }
    if exponent is not None:
        columns["scale_exponent"] = exponent[seen]
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _means(features: np.ndarray, side: int) -> np.ndarray:
    """Average the patches of each chip that have data; NaN where none has."""
    height, width, dim = features.shape
    padded = np.full((-(-height // side) * side, -(-width // side) * side, dim), np.nan, np.float32)
    padded[:height, :width] = features
    parts = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side, dim)
    seen = np.isfinite(parts).all(-1, keepdims=True)
    count = seen.sum((1, 3))
    total = np.where(seen, parts, 0).sum((1, 3), dtype=np.float64)
    means: np.ndarray = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return means


def _schema(store: EmbeddingStore, grid: GeoBox, side: int) -> pa.Schema:
    number, moment = pa.from_numpy_dtype(np.dtype(store.dtype)), pa.timestamp("ms", "UTC")
    fields = [
        pa.field("geometry", pa.binary()),
        pa.field("bbox", pa.struct([pa.field(name, pa.float64()) for name in CORNERS])),
        pa.field("embedding", pa.list_(pa.field("element", number), store.dim)),
        *([pa.field("scale_exponent", pa.int8())] if store.dtype == "int8" else []),
        pa.field("row", pa.int32()),
        pa.field("col", pa.int32()),
        pa.field("start_datetime", moment),
        pa.field("end_datetime", moment),
        pa.field("model", pa.string()),
        pa.field("patch_m", pa.float64()),
    ]
    assert grid.crs is not None
    covering = {name: ["bbox", name] for name in CORNERS}
    geo = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": ["Polygon"],
                "orientation": "counterclockwise",
                "crs": grid.crs.proj.to_json_dict(),
                "bbox": [float(v) for v in grid.extent.boundingbox.bbox],
                "covering": {"bbox": covering},
            }
        },
    }
    a = grid.affine
    own = {
        "shape": [int(n) for n in grid.shape],
        "transform": [a.a, a.b, a.c, a.d, a.e, a.f],
        "crs": grid.crs.to_wkt(),
        "dim": store.dim,
        "dtype": store.dtype,
        "side": side,
        "embeddings": dict(store.about),
    }
    notes = {"geo": geo, "emb": {**_extension(store, side), **proj_fields(grid)}, "panterra:chips": own}
    return pa.schema(fields, metadata={key: json.dumps(value, sort_keys=True) for key, value in notes.items()})


def _extension(store: EmbeddingStore, side: int) -> dict[str, Any]:
    """Describe chips in the words of STAC's embedding extension."""
    return {
        "emb:type": "chip",
        "emb:dimensions": store.dim,
        "data_type": store.dtype,
        "emb:chip_layout": {
            "layout_type": "regular_grid",
            "chip_size": [side * store.about["patch_m"]] * 2,
            "stride": [side * store.about["patch_m"]] * 2,
            "unit": "m",
        },
        **({"emb:quantization": INT8_RULE} if store.dtype == "int8" else {}),
    }


def _model_name(about: Mapping[str, Any]) -> str | None:
    return (about.get("model") or {}).get("name")


def _vectors(rows: pa.Table, dim: int) -> np.ndarray:
    column = rows["embedding"].combine_chunks()
    values: np.ndarray = column.flatten().to_numpy().reshape(-1, dim)
    return values


def _overlaps(group: pq.RowGroupMetaData, row: np.ndarray, col: np.ndarray) -> bool:
    """Tell by a row group's statistics whether it can hold one of the cells."""
    inside = np.ones(len(row), np.bool_)
    for index in range(group.num_columns):
        column = group.column(index)
        for name, places in (("row", row), ("col", col)):
            if column.path_in_schema == name and column.statistics is not None and column.statistics.has_min_max:
                inside &= (places >= column.statistics.min) & (places <= column.statistics.max)
    return bool(inside.any())
