"""Pixels of a file on a grid."""

from __future__ import annotations

import errno
import functools
import glob
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.env
import rasterio.shutil
from affine import Affine
from odc.geo import CRS
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.enums import Interleaving, MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import GCPTransformer
from rasterio.warp import calculate_default_transform, reproject
from rasterio.windows import Window

from panterra.errors import InputError

CACHE_BYTES = 64 * 2**20
"""GDAL's block cache; its default of 5 % of the machine's memory would grow with the scene."""

MAX_OPEN = 16
"""Files that each thread keeps open."""

OPEN_BYTES = 8 * 2**20
"""What they may hold, or one file alone: of each, GDAL keeps the block that it decoded last, beside its cache."""

REMOTE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_HTTP_CONNECTTIMEOUT": "20",
    "GDAL_HTTP_TIMEOUT": "120",
}
"""How GDAL should read over a network: no listing of folders, few and bounded requests."""

ALIGNED_PX = 1e-3
"""A box that lies this close to the file's own pixels, in pixels, is copied and not resampled."""

AVERAGE_FROM = 1.2
"""File pixels per box pixel, along a side, from which pixels are averaged; below, they are interpolated."""

MAX_SOURCE_VALUES = 2**23
"""Values of a file that are resampled at a time; larger boxes are cut."""

Colour = tuple[int, int, int]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_threads = threading.local()


def read_onto(
    path: str | Path,
    box: GeoBox,
    *,
    bands: Sequence[int] | None = None,
    categorical: bool = False,
    nodata: float | None = None,
    scale: float | None = None,
    offset: float | None = None,
) -> tuple[Floats, Bools]:
    """Read bands (counted from 1) of a file or address onto a grid: pixels [C, H, W] and where they are data.

    Where the box lies on the file's own pixels they are copied. Otherwise classes take the nearest pixel, values are
    averaged over coarser pixels and interpolated linearly between finer ones; invalid pixels never contribute. Pixels
    are data unless the file's nodata value, mask or alpha band, `nodata`, NaN or the file's edge says otherwise, and
    hold 0 where they are not. Values are `raw * scale + offset`, with the file's own scale and offset by default.
    The result for a place does not depend on the box around it, but for the small part of a pixel by which GDAL
    approximates a change of projection.
    """
    with _reading(path) as source:
        indexes = tuple(bands) if bands is not None else _value_bands(source)
        _check_bands(source, indexes, path)
        window = _aligned_window(source, box)
        if window is not None:
            values, valid = _read_window(source, indexes, window, nodata)
        else:
            values, valid = _resample(source, indexes, box, categorical, nodata)
        scales = [source.scales[i - 1] if scale is None else scale for i in indexes]
        offsets = [source.offsets[i - 1] if offset is None else offset for i in indexes]
    for band, (factor, term) in enumerate(zip(scales, offsets, strict=True)):
        if (factor, term) != (1.0, 0.0):
            values[band] = values[band] * np.float64(factor) + np.float64(term)
    if not valid.all():
        values[~valid] = 0
    return values, valid


def grid_of(path: str | Path) -> GeoBox:
    """Return the file's own grid; a file placed by control points gets a north-up grid of about its pixel size."""
    with _reading(path) as source:
        placement = _placement(source)
        if placement.affine is not None:
            box = GeoBox((source.height, source.width), placement.affine, placement.crs)
            _check_degrees(box, path)
            return box
        affine, width, height = calculate_default_transform(
            placement.crs, placement.crs, source.width, source.height, gcps=list(placement.points)
        )
        return GeoBox((height, width), affine, placement.crs)


def _check_degrees(box: GeoBox, path: str | Path) -> None:
    """Refuse coordinates that are no degrees, such as those of a UTM zone that was tagged as EPSG:4326."""
    if box.crs is None or not box.crs.geographic:
        return
    west, south, east, north = box.boundingbox
    # Global grids may reach half a pixel beyond the poles, and those over the antimeridian beyond 180.
    if max(-west, east) > 540 or max(-south, north) > 91:
        raise InputError(
            f"{path} lies at {west:g}, {south:g} in {box.crs}, which are no degrees; give it the CRS that it is in, "
            "for example with gdal_edit.py -a_srs"
        )


def dtype_of(path: str | Path) -> np.dtype[Any]:
    """Return the data type of a file's first band."""
    with _reading(path) as source:
        return np.dtype(str(source.dtypes[0]))


def read_legend(path: str | Path) -> tuple[dict[int, str], dict[int, Colour]]:
    """Return the class names and colours that a file carries, both empty where it has none."""
    with _reading(path) as source:
        try:
            names = {int(code): str(name) for code, name in json.loads(source.tags(1)["categories"]).items()}
        except (KeyError, ValueError, AttributeError):
            names = {}
        try:
            table = source.colormap(1)
        except ValueError:
            table = {}
    return names, {code: rgba[:3] for code, rgba in table.items() if code in names or (not names and any(rgba[:3]))}


def write_cog(
    path: str | Path,
    array: npt.NDArray[Any],
    box: GeoBox,
    *,
    nodata: float | None = None,
    band_names: Sequence[str] = (),
    palette: Mapping[int, Colour] | None = None,
    categories: Mapping[int, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Path:
    """Write an array [H, W] or [C, H, W] as a cloud-optimised GeoTIFF; see `CogWriter`."""
    pixels = array[None] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[1:] != tuple(box.shape):
        raise InputError(f"the array is {list(array.shape)}; wanted [H, W] or [C, H, W] of the box, {list(box.shape)}")
    with CogWriter(
        path,
        box,
        len(pixels),
        pixels.dtype,
        nodata=nodata,
        band_names=band_names,
        palette=palette,
        categories=categories,
        tags=tags,
    ) as writer:
        writer.write(Window(0, 0, pixels.shape[2], pixels.shape[1]), pixels)
    return Path(path)


class CogWriter:
    """Write a cloud-optimised GeoTIFF window by window in bounded memory.

    Pixels never written are nodata. With a palette or categories the values are classes: overviews take the commonest
    class, else the average. The file appears under its name when the `with` block ends well, and the same pixels give
    the same bytes in whatever order they came. Class names also stand in `<path>.aux.xml`, where GDAL and QGIS look.
    """

    def __init__(
        self,
        path: str | Path,
        box: GeoBox,
        count: int,
        dtype: npt.DTypeLike,
        *,
        nodata: float | None = None,
        band_names: Sequence[str] = (),
        palette: Mapping[int, Colour] | None = None,
        categories: Mapping[int, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._tiles = self.path.with_name(f".{self.path.name}.tiles.tif")
        self._cog = self.path.with_name(f".{self.path.name}.cog.tif")
        self._count = count
        self._shape = (box.shape.y, box.shape.x)
        self._dtype = np.dtype(dtype)
        self._categories = dict(sorted(categories.items())) if categories else {}
        self._classes = bool(palette or categories)
        if self._dtype.name not in rasterio.dtypes.dtype_rev:
            raise InputError(f"a GeoTIFF cannot hold {self._dtype}; convert the pixels to float32 first")
        if band_names and len(band_names) != count:
            raise InputError(f"{len(band_names)} band names came for {count} bands; give one for each")
        if palette and (count != 1 or self._dtype != np.uint8):
            raise InputError(f"a palette needs one uint8 band; got {count} of {self._dtype}")
        self._block = 512
        # GDAL interleaves the bands of a COG, so a block of many bands must be smaller to stay in the cache.
        while self._block > 128 and self._block**2 * count * self._dtype.itemsize > CACHE_BYTES // 4:
            self._block //= 2
        _bound_cache()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing():
            self._file = rasterio.open(
                self._tiles,
                "w",
                driver="GTiff",
                height=box.shape.y,
                width=box.shape.x,
                count=count,
                dtype=self._dtype.name,
                crs=crs_for_rasterio(box.crs),
                transform=box.affine,
                nodata=nodata,
                tiled=True,
                blockxsize=self._block,
                blockysize=self._block,
                interleave="band",
                sparse_ok=True,
                bigtiff="IF_SAFER",
                **({"photometric": "RGB", "alpha": "NO"} if count == 4 else {}),  # a fourth is infrared, not a mask
            )
        for index, name in enumerate(band_names, start=1):
            self._file.set_band_description(index, name)
        if palette:
            self._file.write_colormap(1, {code: (*colour, 255) for code, colour in sorted(palette.items())})
        if self._categories:
            self._file.update_tags(1, categories=json.dumps(self._categories, ensure_ascii=False))
        self._file.update_tags(**dict(sorted((tags or {}).items())))

    def write(self, window: Window, array: npt.NDArray[Any]) -> None:
        """Put pixels [C, h, w], or [h, w] of a single band, at a window of the box."""
        pixels = array[None] if array.ndim == 2 else array
        if pixels.shape != (self._count, window.height, window.width) or pixels.dtype != self._dtype:
            raise InputError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; "
                f"wanted {self._dtype} {[self._count, window.height, window.width]}"
            )
        with self._writing():
            self._file.write(pixels, window=window)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say where GDAL could not write, as the system would; GDAL's errors, some of which rasterio hides, do not."""
        try:
            yield
        except (RasterioError, CPLE_BaseError) as error:
            first: BaseException = error
            while first.__cause__ is not None:
                first = first.__cause__
            raise OSError(errno.EIO, f"GDAL could not write, as on a full disk ({first})", str(self.path)) from error

    def __enter__(self) -> CogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._writing():
                self._file.close()
                if kind is None:
                    self._finish()
        finally:
            for leftover in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tif*"):
                leftover.unlink()

    def _finish(self) -> None:
        # Left to itself, the COG driver takes memory for overviews that grows with the raster.
        levels = [2**n for n in range(1, 31) if max(self._shape) > self._block * 2 ** (n - 1)]
        with rasterio.open(self._tiles, "r+") as tiles:
            tiles.build_overviews(levels, Resampling.mode if self._classes else Resampling.average)
        rasterio.shutil.copy(
            self._tiles,
            self._cog,
            driver="COG",
            blocksize=self._block,
            overviews="FORCE_USE_EXISTING",
            # Every reader knows DEFLATE; its lowest level is several times faster and hardly larger.
            compress="DEFLATE",
            level=1,
            predictor="NO" if self._classes else "YES",
            bigtiff="IF_SAFER",
        )
        legend = self.path.with_name(f"{self.path.name}.aux.xml")
        legend.unlink(missing_ok=True)
        if self._categories:
            legend.write_text(_pam(self._categories), encoding="utf-8")
        self._cog.replace(self.path)


def _pam(categories: Mapping[int, str]) -> str:
    """Spell class names the way GDAL stores them: a list in which the place is the code."""
    rows = (f"      <Category>{escape(categories.get(i, ''))}</Category>\n" for i in range(max(categories) + 1))
    return (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{''.join(rows)}    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    )


@functools.cache
def _bound_cache() -> None:
    if "GDAL_CACHEMAX" not in os.environ:
        rasterio.env.set_gdal_config("GDAL_CACHEMAX", CACHE_BYTES)


@contextmanager
def _reading(path: str | Path) -> Iterator[DatasetReader]:
    """Lend this thread's handle of a file; what GDAL cannot read becomes an InputError of one line."""
    name = str(path)
    with rasterio.Env(**(REMOTE if _is_remote(name) else {})):
        try:
            yield _handle(name)
        except (RasterioError, CPLE_BaseError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"cannot read {name}: {reason}") from error


def _handle(name: str) -> DatasetReader:
    """Return this thread's open file, reopened when the file has changed or the process has forked."""
    _bound_cache()
    key: tuple[Any, ...] = (os.getpid(), name)
    # A file of its own, and not an address, a path inside an archive or one variable of a NetCDF file.
    if not name.startswith("/vsi") and ":" not in name[2:]:
        try:
            stat = Path(name).stat()
        except FileNotFoundError:
            raise InputError(f"there is no file {name}") from None
        key += (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    handles: OrderedDict[tuple[Any, ...], DatasetReader] = _threads.__dict__.setdefault("handles", OrderedDict())
    if key not in handles:
        opened = rasterio.open(name)
        if not opened.count:
            opened.close()
            raise InputError(f"{name} has no bands; wanted a raster such as a GeoTIFF")
        handles[key] = opened
        while len(handles) > MAX_OPEN or (len(handles) > 1 and sum(map(_block_bytes, handles.values())) > OPEN_BYTES):
            handles.popitem(last=False)[1].close()
    handles.move_to_end(key)
    return handles[key]


def _block_bytes(source: DatasetReader) -> int:
    """Tell how large a decoded block of an open file is, of all bands where they lie together."""
    height, width = source.block_shapes[0]
    value = 8 if "complex" in source.dtypes[0] else np.dtype(source.dtypes[0]).itemsize
    return int(height * width * value * (source.count if source.interleaving == Interleaving.pixel else 1))


def _is_remote(name: str) -> bool:
    return name.startswith(("http://", "https://", "s3://", "gs://", "az://", "/vsicurl", "/vsis3", "/vsigs", "/vsiaz"))


def _value_bands(source: DatasetReader) -> tuple[int, ...]:
    """All bands but alpha."""
    alpha = rasterio.enums.ColorInterp.alpha
    return tuple(i for i, meaning in zip(source.indexes, source.colorinterp, strict=True) if meaning != alpha)


def _check_bands(source: DatasetReader, indexes: Sequence[int], path: str | Path) -> None:
    absent = [i for i in indexes if not 1 <= i <= source.count]
    if absent:
        raise InputError(f"{path} has {source.count} bands; there is no band {absent[0]}")
    if any("complex" in source.dtypes[i - 1] for i in indexes):
        raise InputError(f"{path} holds complex numbers; convert it to intensity (the squared magnitude) first")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placement:
    """Where a file's pixels lie: by an affine transform or by ground control points."""

    crs: Any
    affine: Affine | None = None
    points: tuple[GroundControlPoint, ...] = ()

    def to_pixels(self, x: Doubles, y: Doubles) -> tuple[Doubles, Doubles]:
        """Return columns and rows of places."""
        if self.affine is not None:
            inverse = ~self.affine
            return inverse.a * x + inverse.b * y + inverse.c, inverse.d * x + inverse.e * y + inverse.f
        with GCPTransformer(self.points) as transformer:
            rows, cols = transformer.rowcol(x.ravel(), y.ravel(), op=lambda value: value)
        return np.asarray(cols, float).reshape(x.shape), np.asarray(rows, float).reshape(x.shape)

    def of_window(self, window: Window) -> dict[str, Any]:
        """Place the part of the file inside a window, as arguments of `reproject`."""
        if self.affine is not None:
            return {"src_transform": self.affine @ Affine.translation(window.col_off, window.row_off)}
        return {
            "gcps": [
                GroundControlPoint(p.row - window.row_off, p.col - window.col_off, p.x, p.y, p.z) for p in self.points
            ]
        }


def _placement(source: DatasetReader) -> _Placement:
    points, points_crs = source.gcps
    if source.crs is not None and not source.transform.is_identity:
        return _Placement(crs=source.crs, affine=source.transform)
    if points and points_crs is not None:
        return _Placement(crs=points_crs, points=tuple(points))
    lacks = "place on Earth" if source.transform.is_identity else "coordinate reference system"
    raise InputError(f"{source.name} has no {lacks}; give it one, for example with gdal_edit.py -a_srs and -a_ullr")


@functools.lru_cache(maxsize=256)
def _odc_crs(wkt: str) -> CRS:
    return CRS(wkt)


@functools.lru_cache(maxsize=256)
def _rasterio_crs(text: str) -> Any:
    return rasterio.crs.CRS.from_user_input(text)


@functools.lru_cache(maxsize=256)
def _transformer(of_box: str, of_file: str) -> Transformer:
    return Transformer.from_crs(of_box, of_file, always_xy=True)


def crs_for_rasterio(crs: CRS | None) -> Any:
    """Say a CRS the way rasterio does."""
    if crs is None:
        raise InputError("the box has no coordinate reference system; give it one")
    return _rasterio_crs(f"EPSG:{crs.epsg}" if crs.epsg is not None else crs.to_wkt())


def _aligned_window(source: DatasetReader, box: GeoBox) -> Window | None:
    """Return the window of the file whose pixels are the box's pixels, if there is one."""
    if source.crs is None or source.transform.is_identity or _odc_crs(source.crs.to_wkt()) != box.crs:
        return None
    to_source = ~source.transform @ box.affine
    height, width = box.shape
    col, row = round(to_source.c), round(to_source.f)
    for x, y in ((0, 0), (width, 0), (0, height), (width, height)):
        at_x, at_y = to_source @ (x, y)
        if abs(at_x - col - x) > ALIGNED_PX or abs(at_y - row - y) > ALIGNED_PX:
            return None
    return Window(col, row, width, height)


def _read_window(
    source: DatasetReader, indexes: Sequence[int], window: Window, nodata: float | None
) -> tuple[Floats, Bools]:
    """Copy pixels; what lies outside the file is invalid."""
    values = np.zeros((len(indexes), window.height, window.width), np.float32)
    valid = np.zeros(values.shape, np.bool_)
    left, top = max(window.col_off, 0), max(window.row_off, 0)
    right = min(window.col_off + window.width, source.width)
    bottom = min(window.row_off + window.height, source.height)
    if left >= right or top >= bottom:
        return values, valid
    inner = Window(left, top, right - left, bottom - top)
    rows = slice(top - window.row_off, bottom - window.row_off)
    cols = slice(left - window.col_off, right - window.col_off)
    raw = source.read(list(indexes), window=inner)
    # The nodata value of a float64 file may be beyond float32.
    with np.errstate(over="ignore"):
        values[:, rows, cols] = raw
    whole = np.issubdtype(raw.dtype, np.integer)
    seen = np.ones(raw.shape, np.bool_) if whole else np.isfinite(values[:, rows, cols])
    for band, index in enumerate(indexes):
        flags = source.mask_flag_enums[index - 1]
        missing = {nodata, source.nodatavals[index - 1] if MaskFlags.nodata in flags else None}
        for value in missing - {None}:
            seen[band] &= raw[band] != value
        if MaskFlags.per_dataset in flags or MaskFlags.alpha in flags:
            seen[band] &= source.read_masks(index, window=inner) > 0
    valid[:, rows, cols] = seen
    return values, valid


def _resample(
    source: DatasetReader, indexes: Sequence[int], box: GeoBox, categorical: bool, nodata: float | None
) -> tuple[Floats, Bools]:
    """Warp in memory, so that every kind of invalid pixel is one kind, NaN, which the warper leaves out."""
    placement = _placement(source)
    height, width = box.shape
    values = np.zeros((len(indexes), height, width), np.float32)
    valid = np.zeros(values.shape, np.bool_)
    window, ratio = _source_window(placement, source, box)
    if window is None:
        return values, valid
    if len(indexes) * window.height * window.width > MAX_SOURCE_VALUES and max(height, width) > 1:
        for rows, cols in _halves(height, width):
            part = _resample(source, indexes, box[rows, cols], categorical, nodata)
            values[:, rows, cols], valid[:, rows, cols] = part
        return values, valid
    raw, seen = _read_window(source, indexes, window, nodata)
    raw[~seen] = np.nan
    values.fill(np.nan)
    if categorical:
        options: dict[str, Any] = {"resampling": Resampling.nearest}
    elif ratio < AVERAGE_FROM:
        # GDAL would widen the kernel by a ratio that it guesses from the window.
        options = {"resampling": Resampling.bilinear, "XSCALE": 1, "YSCALE": 1}
    else:
        options = {"resampling": Resampling.average}
    # The warper leaves out a pixel where all the bands it is given are NaN, so bands with gaps of their own go alone.
    alike = bool((seen == seen[:1]).all())
    for bands in [slice(None)] if alike else [slice(i, i + 1) for i in range(len(indexes))]:
        reproject(
            raw[bands],
            values[bands],
            src_crs=placement.crs,
            src_nodata=np.nan,
            dst_transform=box.affine,
            dst_crs=crs_for_rasterio(box.crs),
            dst_nodata=np.nan,
            **placement.of_window(window),
            **options,
        )
    return values, np.isfinite(values)


def _halves(height: int, width: int) -> list[tuple[slice, slice]]:
    if height >= width:
        return [(slice(0, height // 2), slice(0, width)), (slice(height // 2, height), slice(0, width))]
    return [(slice(0, height), slice(0, width // 2)), (slice(0, height), slice(width // 2, width))]


def _source_window(placement: _Placement, source: DatasetReader, box: GeoBox) -> tuple[Window | None, float]:
    """Find the part of the file under the box with a margin, and how many file pixels the side of a box pixel spans."""
    height, width = box.shape
    cols, rows = np.meshgrid(np.linspace(0, width, 21), np.linspace(0, height, 21))
    to = box.affine
    to_file = _transformer(str(box.crs), placement.crs.to_wkt())
    x, y = to_file.transform(to.a * cols + to.b * rows + to.c, to.d * cols + to.e * rows + to.f)
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return None, 1.0
    at_col, at_row = placement.to_pixels(np.where(known, x, x[known][0]), np.where(known, y, y[known][0]))
    down = np.hypot(np.diff(at_col, axis=0), np.diff(at_row, axis=0)) * 20 / height
    across = np.hypot(np.diff(at_col, axis=1), np.diff(at_row, axis=1)) * 20 / width
    ratio = float(np.sqrt(np.median(down) * np.median(across)))
    if not known.all():
        # Part of the box lies off this map projection: how far the rest reaches is not known.
        return Window(0, 0, source.width, source.height), ratio
    margin = 4 + 2 * ratio
    left, top = max(math.floor(at_col.min() - margin), 0), max(math.floor(at_row.min() - margin), 0)
    right = min(math.ceil(at_col.max() + margin), source.width)
    bottom = min(math.ceil(at_row.max() + margin), source.height)
    inside = left < right and top < bottom
    return Window(left, top, right - left, bottom - top) if inside else None, ratio
