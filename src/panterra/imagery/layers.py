"""The images that someone's files hold, as found."""

from __future__ import annotations

import datetime as dt
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from odc.geo import CRS
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.imagery.naming import AUXILIARY, NamedDate, hinted, match_bands, read_date, words
from panterra.imagery.raster import grid_of
from panterra.modalities import MODALITIES

Pixels = npt.NDArray[Any]

RASTERS = (".tif", ".tiff", ".jp2", ".vrt", ".img")
NETCDF = (".nc", ".nc4")
ARCHIVES = (".npz",)

TIME_AXIS = "the time axis"

# Names of tags that hold the acquisition, not the processing.
_DATE_TAGS = ("acquisition_date", "datetime", "sensing_time", "date_acquired", "date", "month", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One image of one date, before anything is decided about it."""

    path: Path
    label: str
    """How messages name it: the file, and the array in it."""
    text: str
    """Words that may tell the sensor and the processing level."""
    box: GeoBox
    dtype: np.dtype[Any]
    names: tuple[str, ...]
    """What the file calls its bands; "" where it says nothing."""
    indexes: tuple[int, ...]
    """Where these bands stand in the file, from 1."""
    nodata: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    dates: tuple[NamedDate, ...] = ()
    """What a time axis, or tags and the name, say; two that differ are a contradiction."""
    load: Callable[[], Pixels] | None = None
    """Reads [C, H, W] from a container; None for a raster that GDAL reads where it lies."""


def open_layers(path: Path, bands: Sequence[str] | None = None) -> tuple[list[Layer], list[str]]:
    """Open a GeoTIFF, a NetCDF cube or an archive of arrays: its images, and the names of arrays that are none.

    `bands` replaces what the file calls its bands.
    """
    left_out: list[str] = []
    suffix = path.suffix.lower()
    if suffix in NETCDF:
        layers = _open_netcdf(path)
    elif suffix in ARCHIVES:
        layers, left_out = _open_archive(path)
    else:
        layers = [_open_raster(path)]
    if bands is not None:
        layers = [_renamed(layer, bands) for layer in layers]
    return [part for layer in layers for part in _split_dated_bands(layer)], left_out


def _renamed(layer: Layer, bands: Sequence[str]) -> Layer:
    if len(bands) != len(layer.names):
        raise InputError(
            f"--bands names {len(bands)} bands but {layer.label} has {len(layer.names)}; "
            'give one name for each, "-" for one to leave out'
        )
    return replace(layer, names=tuple(bands))


def _open_raster(path: Path) -> Layer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        box = grid_of(path)
        with rasterio.open(path) as source:
            tags = {k.lower(): v for k, v in source.tags().items()}
            # Also what GDAL takes for transparency: the fourth band of bytes is often the near infrared.
            indexes = source.indexes
            names = tuple(name or "" for name in source.descriptions)
            scaling = {(source.scales[i - 1], source.offsets[i - 1]) for i in indexes}
            if len(scaling) > 1:
                raise InputError(f"the bands of {path} have scales of their own; write one file per band")
            dtype, nodata = np.dtype(source.dtypes[0]), source.nodata
            if dtype.kind == "c":
                raise InputError(f"{path} holds complex numbers; write their amplitude or power to a file first")
    scale, offset = scaling.pop()
    found = [*[read_date(tags[tag]) for tag in _DATE_TAGS if tag in tags][:1], read_date(path.stem)]
    return Layer(
        path=path,
        label=path.name,
        text=path.stem if hinted(path.stem) else f"{_product(path)} {path.stem}",
        box=box,
        dtype=dtype,
        names=_single_name(names[0], path.stem) if len(names) == 1 else names,
        indexes=indexes,
        nodata=nodata,
        scale=scale,
        offset=offset,
        dates=tuple(d for d in found if d is not None),
    )


def _product(path: Path) -> str:
    """Name the folder that tells what a file belongs to: ESA's product, else the one it lies in."""
    return next((part for part in path.parts if part.endswith(".SAFE")), path.parent.name)


def _single_name(described: str, stem: str) -> tuple[str]:
    """Name the only band of a file: by its description, or as the file where that says nothing."""
    if "scl" in words(f"{described} {stem}"):
        return ("SCL",)
    return (described if _is_telling(described) else stem,)


def _is_telling(name: str) -> bool:
    return name.lower() in AUXILIARY or any(match_bands([name], m)[0] for m in MODALITIES.values())


def _split_dated_bands(layer: Layer) -> Iterator[Layer]:
    """Take a stack apart whose band names hold dates ("B02_2020-05-01")."""
    found = [read_date(name) for name in layer.names]
    if layer.load is not None or len(layer.names) == 1 or not all(found):
        yield layer
        return
    for day in dict.fromkeys(d for d in found if d is not None):
        at = [i for i, d in enumerate(found) if d == day]
        yield replace(
            layer,
            names=tuple(layer.names[i] for i in at),
            indexes=tuple(layer.indexes[i] for i in at),
            dates=(day,),
        )


def _open_netcdf(path: Path) -> list[Layer]:
    """Open variables [time?, band?, y, x] with a grid mapping, as openEO and WorldCereal write them."""
    import xarray as xr

    try:
        data = xr.open_dataset(path, engine="h5netcdf", mask_and_scale=False, decode_timedelta=False, cache=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path.name} as NetCDF 4: {str(error).splitlines()[0]}") from None
    images = [v for v in data.data_vars.values() if _axis(v, "x") and _axis(v, "y") and v.dtype.kind in "iuf"]
    if not images:
        raise InputError(f"{path.name} has no variable with x and y axes; its variables: {', '.join(map(str, data))}")
    box, upside_down = _netcdf_box(path, data, images[0])
    # What is masked and what masks go apart, as do variables on other axes or of another type.
    kinds: dict[Any, list[Any]] = {}
    for image in images:
        kinds.setdefault((image.dims, image.dtype, "scl" in words(str(image.name))), []).append(image)
    return [layer for (*_, scl), group in kinds.items() for layer in _netcdf_layers(path, group, scl, box, upside_down)]


def _netcdf_layers(path: Path, group: list[Any], scl: bool, box: GeoBox, upside_down: bool) -> list[Layer]:
    first = group[0]
    time = next((d for d in first.dims if d in first.coords and first[d].dtype.kind == "M"), None)
    stack = next((d for d in first.dims if d not in (time, _axis(first, "x"), _axis(first, "y"))), None)
    names = ("SCL",) if scl else tuple(str(v.name) for v in group)
    if stack is not None:
        if len(group) > 1 or stack not in first.coords:
            raise InputError(f"{path.name}: axis {stack!r} of {first.name!r} has no names; give it band names first")
        names = tuple(map(str, first[stack].values))
    # CF keeps unsigned numbers in signed types and says so.
    unsigned = first.attrs.get("_Unsigned") == "true" and first.dtype.kind == "i"
    dtype = np.dtype(first.dtype.str.replace("i", "u")) if unsigned else first.dtype
    fill = first.attrs.get("_FillValue", first.attrs.get("missing_value"))
    nodata = None if fill is None else float(np.asarray(fill, first.dtype).astype(first.dtype).view(dtype).item())

    def load(step: int | None) -> Pixels:
        parts = []
        for variable in group:
            image = variable if step is None else variable.isel({time: step})
            order = [d for d in (stack, _axis(variable, "y"), _axis(variable, "x")) if d]
            values = np.ascontiguousarray(image.transpose(*order).values).view(dtype)
            parts.append(values if stack else values[None])
        pixels = np.concatenate(parts)
        return np.ascontiguousarray(pixels[:, ::-1]) if upside_down else pixels

    common = Layer(
        path=path,
        label=path.name,
        text=f"{path.stem} {' '.join(names)}",
        box=box,
        dtype=dtype,
        names=names,
        indexes=tuple(range(1, len(names) + 1)),
        nodata=nodata,
        scale=float(first.attrs.get("scale_factor", 1)),
        offset=float(first.attrs.get("add_offset", 0)),
    )
    if time is None:
        named = read_date(path.stem)
        return [replace(common, dates=(named,) if named else (), load=functools.partial(load, None))]
    days = [dt.date.fromisoformat(str(t)[:10]) for t in first[time].values.astype("datetime64[D]")]
    return [
        replace(common, dates=(NamedDate(date=day, how=TIME_AXIS),), load=functools.partial(load, step))
        for step, day in enumerate(days)
    ]


def _axis(variable: Any, which: str) -> str | None:
    names = {"x": ("x", "lon", "longitude", "easting"), "y": ("y", "lat", "latitude", "northing")}[which]
    return next((str(d) for d in variable.dims if str(d).lower() in names), None)


def _netcdf_box(path: Path, data: Any, variable: Any) -> tuple[GeoBox, bool]:
    """Build the grid from coordinates of pixel centres; the flag says that rows run from the south."""
    x_name, y_name = _axis(variable, "x"), _axis(variable, "y")
    x, y = (np.asarray(data[name].values, np.float64) for name in (x_name, y_name))
    if len(x) < 2 or len(y) < 2:
        raise InputError(f"{path.name} is {len(y)} x {len(x)} pixels; a scene needs at least 2 x 2")
    step_x, step_y = (x[-1] - x[0]) / (len(x) - 1), (y[-1] - y[0]) / (len(y) - 1)
    for axis, step in ((x, step_x), (y, step_y)):
        if np.abs(np.diff(axis) - step).max() > abs(step) * 1e-2:
            raise InputError(f"{path.name} has uneven coordinates; resample it to a regular grid first")
    mapping = variable.attrs.get("grid_mapping", "spatial_ref")
    attributes = {**data.attrs, **(data[mapping].attrs if mapping in data.variables else {})}
    crs = next((attributes[k] for k in ("crs_wkt", "spatial_ref", "crs", "epsg") if attributes.get(k)), None)
    if crs is None and str(data[x_name].attrs.get("units", "")).startswith("degrees"):
        crs = 4326
    if crs is None:
        raise InputError(f"{path.name} names no coordinate reference system; add a CF grid mapping with crs_wkt")
    upside_down = bool(step_y > 0)
    top = y.max() + abs(step_y) / 2
    affine = Affine(step_x, 0, x[0] - step_x / 2, 0, -abs(step_y), top)
    return GeoBox((len(y), len(x)), affine, CRS(str(crs) if not str(crs).isdigit() else int(crs))), upside_down


def _step_of(pixels: Callable[[], Pixels], step: int | None) -> Pixels:
    image = pixels() if step is None else pixels()[step]
    return image if image.ndim == 3 else image[None]


def _open_archive(path: Path) -> tuple[list[Layer], list[str]]:
    """Open arrays [T, C, H, W] or [C, H, W] whose grid, bands and sensors stand in a metadata.json beside them."""
    sidecar = path.with_name("metadata.json")
    if not sidecar.is_file():
        raise InputError(f"{path.name} holds arrays without a place on Earth; convert it to GeoTIFF or NetCDF first")
    known = json.loads(sidecar.read_text())
    archive = np.load(path, allow_pickle=False)
    layers: list[Layer] = []
    for key in archive.files:
        # The scene classes lie on the grid of the bands they belong to and have its dates.
        scl = "_scl" in key
        home = key.replace("_scl", "")
        about = known.get("sensors", {}).get(home, {})
        names = ["SCL"] if scl and about else about.get("bands") or known.get(f"{key}_bands")
        affine = about.get("transform") or known.get("transform")
        pixels = functools.cache(functools.partial(archive.__getitem__, key))
        if not (names and affine and "epsg" in known) or pixels().ndim not in (3, 4):
            continue
        days: list[str | None] = [None]
        if scl or pixels().ndim == 4:
            days = list(archive[f"{home}_dates" if f"{home}_dates" in archive.files else "dates"])
        common = Layer(
            path=path,
            label=f"{path.name}:{key}",
            text=f"{key} {Path(about.get('original_file', '')).stem}",
            box=GeoBox(pixels().shape[-2:], Affine(*affine), CRS(known["epsg"])),
            dtype=pixels().dtype,
            names=tuple(names),
            indexes=tuple(range(1, len(names) + 1)),
            nodata=known.get("nodata"),
        )
        for step, day in enumerate(days):
            load = functools.partial(_step_of, pixels, None if day is None else step)
            found = None if day is None else read_date(str(day))
            layers.append(replace(common, load=load, dates=(found,) if found else ()))
    used = {layer.label.rpartition(":")[2] for layer in layers}
    return layers, [f"{path.name}:{k}" for k in archive.files if k not in used and not k.endswith("dates")]
