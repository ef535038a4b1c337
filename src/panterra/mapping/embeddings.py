"""Stored embeddings of an area."""

from __future__ import annotations

import datetime as dt
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyproj
import rasterio
import zarr
import zarr.codecs
from odc.geo.geobox import GeoBox
from rasterio.windows import Window as FileWindow

from panterra.errors import InputError
from panterra.evaluate.quantise import dequantise, quantise
from panterra.mapping.tiles import Window, blocks

Dtype = Literal["float32", "float16", "int8"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")

CHUNK_BYTES = 2**20
"""Up to this size chunks of a Zarr store grow: each costs a reader about a millisecond, however small it is."""
BLOCK_BYTES = 2**25
"""What a reader of a whole store holds of it at a time, as stored."""

NO_BYTE = -128
"""Marks a patch without data in int8; the quantisation rule uses -127 to 127."""
INT8_RULE = {
    "method": "signed square root, one scale per patch",
    "original_dtype": "float32",
    "quantized_dtype": "int8",
    "value": "2 ** (scale_exponent / 8) * sign(q) * (q / 127.5) ** 2",
    "quantized": "q = round(clip(sign(x) * sqrt(|x|) * 127.5, -127, 127)), x = value / 2 ** (scale_exponent / 8)",
    "scale_exponent": "the smallest whole number for which no |x| of the patch exceeds 1",
    "nodata": NO_BYTE,
}
"""OlmoEarth's rule for values within ±1; the scale brings every patch there, so that nothing is clipped."""
HOLDS = {"float16": 65504.0, "int8": 2.0 ** (127 / 8)}
"""The largest value of the small types; in int8 by its largest scale."""


def to_bytes(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Store features [..., D] as int8 [..., D] and their scale's exponent, int8 [...], by `INT8_RULE`."""
    seen = np.isfinite(features).all(-1)
    known = np.where(seen[..., None], features, 0)
    # The smallest exponent is far below any feature that means something, and keeps clear of NO_BYTE.
    exponent = np.ceil(8 * np.log2(np.maximum(np.abs(known).max(-1), 2.0**-15)))
    codes = quantise(known / np.exp2(exponent / 8)[..., None])
    return np.where(seen[..., None], codes, NO_BYTE).astype(np.int8), np.where(seen, exponent, NO_BYTE).astype(np.int8)


def from_bytes(codes: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Turn what `to_bytes` made back into float32 features; NaN where nodata."""
    values = dequantise(codes) * np.exp2(exponent.astype(np.float32) / 8)[..., None]
    return np.where((exponent == NO_BYTE)[..., None], np.float32(np.nan), values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Vectors as they are stored, and the cells of a grid that they belong to."""

    codes: np.ndarray
    """[D, n], of the type of the store; int8 without the scales, on which directions do not depend."""
    cells: np.ndarray
    """[n], counted row by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingStore:
    """Embeddings of an area on a grid of patches, opened for reading."""

    path: Path
    box: GeoBox
    """One cell per patch."""
    dim: int
    dtype: Dtype
    about: Mapping[str, Any]
    """model, patch_m, modalities, window_px, overlap_px, dates and licence, as far as they were recorded."""
    block: tuple[int, int]
    """Rows and columns that are stored together: a shard, or a block of a GeoTIFF."""
    chunk: tuple[int, int]
    """Rows and columns that are read together; a whole number of them makes a block."""
    _fetch: Callable[[Window], tuple[np.ndarray, np.ndarray | None]]
    """Reads a window as stored: [D, h, w], and of int8 the exponents of the scales [h, w]."""
    offset: tuple[int, int] = (0, 0)
    """Rows and columns of the first block that lie before the area; more than 0 in a part of a store."""

    @property
    def dates(self) -> list[dt.date]:
        """Of the inputs, earliest first."""
        return dates_of(self.about)

    @property
    def passport(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def read(self, window: Window | None = None) -> np.ndarray:
        """Read features, float32 [rows, columns, D]; NaN where there was no data."""
        height, width = self.box.shape
        window = window or Window(row=0, col=0, height=height, width=width)
        codes, exponent = self.stored(window)
        codes = np.moveaxis(codes, 0, -1)
        return from_bytes(codes, exponent) if exponent is not None else np.ascontiguousarray(codes, dtype=np.float32)

    def stored(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        """Read numbers as they are stored, [D, rows, columns], and of int8 the scales' exponents [rows, columns]."""
        height, width = self.box.shape
        if window.row < 0 or window.col < 0 or window.row + window.height > height or window.col + window.width > width:
            raise InputError(f"{window} is not inside the {height} x {width} patches of {self.path}")
        return self._fetch(window)

    def part(self, window: Window, inside: Callable[[Window], np.ndarray]) -> EmbeddingStore:
        """View the patches in a window; those that are not `inside`, a mask of any window in it, are nodata.

        Nothing is read but what lies around patches inside.
        """
        nodata = NO_BYTE if self.dtype == "int8" else np.nan

        def fetch(wanted: Window) -> tuple[np.ndarray, np.ndarray | None]:
            mask = inside(wanted)
            codes = np.full((self.dim, *mask.shape), nodata, self.dtype)
            exponent = np.full(mask.shape, NO_BYTE, np.int8) if self.dtype == "int8" else None
            rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            if not len(rows):
                return codes, exponent
            near = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
            stored, scales = self._fetch(
                Window(
                    row=window.row + wanted.row + int(rows[0]),
                    col=window.col + wanted.col + int(cols[0]),
                    height=int(rows[-1] - rows[0] + 1),
                    width=int(cols[-1] - cols[0] + 1),
                )
            )
            kept = mask[near]
            codes[:, *near][:, kept] = stored[:, kept]
            if exponent is not None and scales is not None:
                exponent[near][kept] = scales[kept]
            return codes, exponent

        before = (window.row + self.offset[0]) % self.block[0], (window.col + self.offset[1]) % self.block[1]
        return replace(self, box=self.box[window.slices], offset=before, _fetch=fetch)

    def windows(self, *, multiple: int = 1) -> list[Window]:
        """Cut the store into windows of at most `BLOCK_BYTES` that read each chunk once, or begin at a `multiple`."""
        (rows, cols), (unit_rows, unit_cols) = self.block, self.chunk
        most = max(BLOCK_BYTES // (self.dim * np.dtype(self.dtype).itemsize), 1)
        while rows * cols > most and (rows > unit_rows or cols > unit_cols):
            if rows > unit_rows and (rows >= cols or cols == unit_cols):
                rows = max(rows // 2 // unit_rows, 1) * unit_rows
            else:
                cols = max(cols // 2 // unit_cols, 1) * unit_cols
        while rows * cols * 4 <= most and (rows < self.box.shape[0] or cols < self.box.shape[1]):
            rows, cols = 2 * rows, 2 * cols
        rows, cols = (max(n // multiple, 1) * multiple for n in (rows, cols))
        return [tile.core for tile in blocks(*self.box.shape, rows=rows, cols=cols)]

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """Go through all patches as stored, in bounded memory, from a block on."""
        for window in self.windows()[first:]:
            codes, _ = self.stored(window)
            yield Block(codes=codes.reshape(self.dim, -1), cells=cells_of(window, self.box))

    def sample(self, row: np.ndarray, col: np.ndarray) -> np.ndarray:
        """Read the features of single patches, float32 [n, D]; each chunk is read once."""
        row, col = np.asarray(row), np.asarray(col)
        height, width = self.box.shape
        if len(row) and (min(row.min(), col.min()) < 0 or row.max() >= height or col.max() >= width):
            raise InputError(f"some rows and columns lie outside the {height} x {width} patches of {self.path}")
        result = np.full((len(row), self.dim), np.nan, np.float32)
        chunks = np.stack([row // self.chunk[0], col // self.chunk[1]], axis=1)
        for chunk in np.unique(chunks, axis=0):
            here = np.flatnonzero((chunks == chunk).all(1))
            top, left = row[here].min(), col[here].min()
            window = Window(
                row=int(top),
                col=int(left),
                height=int(row[here].max() - top + 1),
                width=int(col[here].max() - left + 1),
            )
            result[here] = self.read(window)[row[here] - top, col[here] - left]
        return result


def dates_of(about: Mapping[str, Any]) -> list[dt.date]:
    """Return the dates of the inputs of a store, earliest first."""
    return sorted(dt.date.fromisoformat(date) for date in about.get("dates") or ())


def cells_of(window: Window, box: GeoBox) -> np.ndarray:
    """Number the cells of a window in the grid around it, row by row."""
    rows, cols = np.arange(window.row, window.row + window.height), np.arange(window.col, window.col + window.width)
    cells: np.ndarray = (rows[:, None] * box.shape[1] + cols).ravel()
    return cells


def ground_of(row: np.ndarray, col: np.ndarray, box: GeoBox) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y in the CRS of a grid of places given in cells; centres are at halves."""
    a = box.affine
    return a.a * col + a.b * row + a.c, a.d * col + a.e * row + a.f


def lonlat_of(row: np.ndarray, col: np.ndarray, box: GeoBox) -> np.ndarray:
    """Return longitude and latitude [n, 2] of the centres of cells."""
    assert box.crs is not None
    x, y = ground_of(row + 0.5, col + 0.5, box)
    return np.stack(pyproj.Transformer.from_crs(box.crs.to_wkt(), "EPSG:4326", always_xy=True).transform(x, y), axis=1)


def is_tif(path: str | Path) -> bool:
    """Tell whether a name is that of a GeoTIFF."""
    return Path(path).suffix.lower() in (".tif", ".tiff")


def file_window(window: Window) -> FileWindow:
    """Express a window as rasterio does."""
    return FileWindow(window.col, window.row, window.width, window.height)


def open_embeddings(path: str | Path) -> EmbeddingStore:
    """Open what `embed` wrote: a Zarr store or a GeoTIFF."""
    path = Path(path)
    if path.is_dir() and (path / "zarr.json").is_file():
        return _open_zarr(path)
    if path.is_file() and is_tif(path):
        return _open_cog(path)
    raise InputError(f"{path} holds no embeddings; wanted a folder or .tif that `panterra embed` wrote")


def create_zarr(
    path: Path, box: GeoBox, *, dim: int, dtype: Dtype, shard: tuple[int, int], chunk: tuple[int, int], about: Any
) -> None:
    """Make an empty Zarr v3 store with dimensions embedding, y, x; CF and `proj:` attributes tell where it lies.

    Chunks are `chunk` patches at least, and larger ones that still divide the shard up to `CHUNK_BYTES`.
    """
    group: Any = zarr.create_group(store=str(path), zarr_format=3)
    assert box.crs is not None
    crs = box.crs.proj
    left, top = box.affine.c, box.affine.f
    group.attrs.update(
        {
            "Conventions": "CF-1.11",
            **proj_fields(box),
            "proj:wkt2": crs.to_wkt(),
            "spatial:dimensions": ["y", "x"],
            "emb:type": "pixel",
            "emb:dimensions": dim,
            "data_type": dtype,
            **({"emb:quantization": INT8_RULE} if dtype == "int8" else {}),
            "panterra:embeddings": about,
        }
    )
    array_box = (dim, *box.shape)
    chunk = _grown(chunk, shard, CHUNK_BYTES // (dim * np.dtype(dtype).itemsize))
    layout: dict[str, Any] = {
        "dtype": dtype,
        "compressors": zarr.codecs.BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
        "fill_value": NO_BYTE if dtype == "int8" else float("nan"),
    }
    fill = {"_FillValue": NO_BYTE} if dtype == "int8" else {}
    group.create_array(
        "embeddings",
        shape=array_box,
        shards=(dim, *shard),
        chunks=(dim, *chunk),
        dimension_names=("embedding", "y", "x"),
        attributes={"grid_mapping": "spatial_ref", **fill},
        **layout,
    )
    if dtype == "int8":
        group.create_array(
            "scale_exponent",
            shape=box.shape,
            shards=shard,
            chunks=chunk,
            dimension_names=("y", "x"),
            attributes={"grid_mapping": "spatial_ref", "rule": INT8_RULE["value"], **fill},
            **layout,
        )
    height, width = box.shape
    ticks = {
        "y": (top + (np.arange(height) + 0.5) * box.affine.e, "projection_y_coordinate"),
        "x": (left + (np.arange(width) + 0.5) * box.affine.a, "projection_x_coordinate"),
    }
    for name, (values, standard) in ticks.items():
        group.create_array(
            name,
            data=values,
            dimension_names=(name,),
            attributes={"standard_name": standard, "units": crs.axis_info[0].unit_name},
        )
    a = box.affine
    group.create_array(
        "spatial_ref",
        data=np.array(0),
        dimension_names=(),
        attributes={**crs.to_cf(), "GeoTransform": f"{a.c!r} {a.a!r} {a.b!r} {a.f!r} {a.d!r} {a.e!r}"},
    )
    with warnings.catch_warnings():
        # Readers such as xarray look for it first, though of version 3 it is not part of the specification yet.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(str(path))


def _grown(chunk: tuple[int, int], shard: tuple[int, int], most: int) -> tuple[int, int]:
    """Return the largest multiple of a chunk, by one factor, that divides the shard and holds at most so many cells."""
    units, patches = [s // c for s, c in zip(shard, chunk, strict=True)], chunk[0] * chunk[1]
    fits = [n for n in range(1, min(units) + 1) if not any(u % n for u in units) and patches * n**2 <= most]
    factor = max(fits, default=1)
    return chunk[0] * factor, chunk[1] * factor


def _check_size(features: np.ndarray, dtype: str) -> None:
    if dtype in HOLDS and (largest := np.nanmax(np.abs(features), initial=0)) > HOLDS[dtype]:
        raise InputError(f"features reach {largest:.6g}, and {dtype} holds {HOLDS[dtype]:.6g}; store them as float32")


def write_zarr(path: Path, window: Window, features: np.ndarray) -> None:
    """Write features [h, w, D] into a store; whole shards are written atomically."""
    group = cast(Any, zarr.open_group(str(path), mode="r+"))
    array, (rows, cols) = group["embeddings"], window.slices
    _check_size(features, array.dtype.name)
    if array.dtype == np.int8:
        features, exponent = to_bytes(features)
        group["scale_exponent"][rows, cols] = exponent
    array[:, rows, cols] = np.moveaxis(features, -1, 0).astype(array.dtype)


def cog_bands(features: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Lay features [h, w, D] out as the bands of a GeoTIFF; in int8 the scale's exponent is the last one."""
    _check_size(features, dtype)
    if dtype == "int8":
        codes, exponent = to_bytes(features)
        return np.moveaxis(np.concatenate([codes, exponent[..., None]], axis=-1), -1, 0)
    return np.moveaxis(features, -1, 0).astype(dtype)


def cog_tags(about: Mapping[str, Any], dtype: Dtype) -> dict[str, str]:
    """Describe the embeddings of a GeoTIFF in tags that `open_embeddings` understands."""
    tags = {"panterra_embeddings": json.dumps(about, sort_keys=True)}
    return {**tags, "emb_quantization": json.dumps(INT8_RULE)} if dtype == "int8" else tags


def cog_band_names(dim: int, dtype: Dtype) -> tuple[str, ...]:
    """Name the bands of a GeoTIFF of embeddings."""
    return (*(f"e{i:04d}" for i in range(dim)), *(("scale_exponent",) if dtype == "int8" else ()))


def proj_fields(box: GeoBox) -> dict[str, Any]:
    """Say where a grid lies in the words of STAC's projection extension."""
    assert box.crs is not None
    a, extent = box.affine, box.extent.boundingbox
    crs = {"proj:code": f"EPSG:{box.crs.epsg}"} if box.crs.epsg else {"proj:code": None, "proj:wkt2": box.crs.to_wkt()}
    return {
        **crs,
        "proj:shape": [int(n) for n in box.shape],
        "proj:transform": [float(v) for v in (a.a, a.b, a.c, a.d, a.e, a.f)],
        "proj:bbox": [float(v) for v in extent.bbox],
    }


def _open_zarr(path: Path) -> EmbeddingStore:
    group = cast(Any, zarr.open_group(str(path), mode="r"))
    try:
        array, about = group["embeddings"], group.attrs["panterra:embeddings"]
    except KeyError:
        raise InputError(f"{path} is a Zarr store without embeddings; wanted one that `panterra embed` wrote") from None

    exponents = group["scale_exponent"] if array.dtype == np.int8 else None

    def fetch(window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        rows, cols = window.slices
        return array[:, rows, cols], exponents[rows, cols] if exponents is not None else None

    dim, height, width = array.shape
    transform, crs = group.attrs["proj:transform"], group.attrs["proj:wkt2"]
    return EmbeddingStore(
        path=path,
        box=GeoBox((height, width), rasterio.Affine(*transform), pyproj.CRS.from_user_input(crs)),
        dim=dim,
        dtype=array.dtype.name,
        about=about,
        block=array.shards[1:],
        chunk=array.chunks[1:],
        _fetch=fetch,
    )


def _open_cog(path: Path) -> EmbeddingStore:
    with rasterio.open(path) as file:
        about = file.tags().get("panterra_embeddings")
        if about is None:
            raise InputError(f"{path} holds no embeddings; wanted a file that `panterra embed` wrote")
        box = GeoBox((file.height, file.width), file.transform, file.crs)
        dtype, bands, block = file.dtypes[0], file.count, file.block_shapes[0]

    def fetch(window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        with rasterio.open(path) as file:
            stored = file.read(window=file_window(window))
        return (stored[:-1], stored[-1]) if dtype == "int8" else (stored, None)

    return EmbeddingStore(
        path=path,
        box=box,
        dim=bands - (dtype == "int8"),
        dtype=dtype,
        about=json.loads(about),
        block=block,
        chunk=block,
        _fetch=fetch,
    )
