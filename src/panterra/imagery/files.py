"""People's own rasters as a scene."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
import rasterio
import rasterio.shutil
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

from panterra.errors import InputError
from panterra.files import unfinished
from panterra.imagery.items import SceneAsset, SceneBand
from panterra.imagery.layers import ARCHIVES, NETCDF, RASTERS, TIME_AXIS, Layer, open_layers
from panterra.imagery.naming import AUXILIARY, NamedDate, candidates, match_bands, processing_baseline, words
from panterra.imagery.raster import CogWriter, write_cog
from panterra.imagery.stac import Scene, make_item, open_scene, save_scene
from panterra.imagery.units import FileUnit, file_unit, file_units, offset_kept, plausible_units, to_declared
from panterra.modalities import MODALITIES

SRTM_FLOWN = dt.date(2000, 2, 11)
"""The date of an elevation model that tells none: the shuttle's radar mission."""

DARKEST_AIR = 600
"""Reflectance times 10,000 in Sentinel-2's B02, below which nothing lies at the top of the atmosphere: air scatters."""

SAMPLED = 32
"""How many images of those that were made alike are looked into."""

Numbers = npt.NDArray[np.float64]

# Also -999, -9999 and -32768 that were kept without their sign.
_NODATA = {"uint8": (), "uint16": (65535, 64537, 55537, 32768), "int16": (-32768, -9999, -999)}

_SENTINEL2 = {"sentinel2", "sentinel2_l2a"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingest:
    """A scene made of files, and what had to be decided on the way, one sentence each."""

    scene: Scene
    decisions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A layer and what was decided about it."""

    layer: Layer
    modality: str
    bands: tuple[str | None, ...]
    """Ours, in the file's order; None is left out."""
    unit: FileUnit
    date: dt.date


def scene_from_files(
    files: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    modality: str | None = None,
    dates: str | Path | Sequence[str | dt.date] | None = None,
    bands: Sequence[str] | None = None,
    unit: str | None = None,
    copy: bool = True,
    title: str | None = None,
    licence: str | None = None,
) -> Ingest:
    """Make a scene of GeoTIFFs, NetCDF cubes or folders of them, and say what was decided on the way.

    Dates come from tags, names and time axes, bands from descriptions and names, units from the numbers; what stays
    doubtful is an InputError that names the option to give. `dates` is one date for all files, one per file in their
    order, one per band of a single file, or a text file of dates; `bands` are the names of each file's bands in order,
    "-" for one to leave out. With `copy=False` rasters stay where they are and the scene refers to them.
    """
    if modality is not None and modality not in MODALITIES:
        raise InputError(f"no modality {modality!r}; --modality knows: {', '.join(sorted(MODALITIES))}")
    out, decisions = Path(out), list[str]()
    found, explicit = _list_files([files] if isinstance(files, str | Path) else files, out)
    layers = [layer for path in found for layer in _opened(path, bands, decisions)]
    if dates is not None:
        layers = _date_by_hand(layers, _parse_dates(dates), decisions)
    masks = [layer for layer in layers if layer.names == ("SCL",)]
    layers = [layer for layer in layers if layer.names != ("SCL",)]
    options = _identify(layers, modality, explicit, decisions)
    images = _decide_dates(_decide_units(options, unit, decisions), decisions)
    groups = _group(images, decisions)
    items = [_write_item(name, group, masks, out, copy) for name, group in sorted(groups.items())]
    save_scene(out, items, title=title or out.name, licence=licence)
    return Ingest(scene=open_scene(out), decisions=tuple(dict.fromkeys(decisions)))


def _list_files(files: Iterable[str | Path], out: Path) -> tuple[list[Path], set[Path]]:
    """List rasters and cubes, folders searched throughout (except `out`), and those of them that were named."""
    found: list[Path] = []
    named = set()
    kinds = RASTERS + NETCDF + ARCHIVES
    for file in map(Path, files):
        if file.is_dir():
            inside = [p for p in sorted(file.rglob("*")) if p.suffix.lower() in kinds and not p.name.startswith(".")]
            # Rasters first: where an archive holds the same images, the rasters are kept.
            found += sorted((p for p in inside if out not in p.parents), key=lambda p: p.suffix.lower() not in RASTERS)
        elif file.is_file():
            found.append(file)
            named.add(file)
        else:
            raise InputError(f"there is no file {file}")
    if not found:
        raise InputError(f"no rasters in {', '.join(map(str, files))}; wanted files that end in {', '.join(kinds)}")
    return found, named


def _opened(path: Path, bands: Sequence[str] | None, decisions: list[str]) -> list[Layer]:
    layers, left_out = open_layers(path, bands)
    if left_out:
        decisions.append(f"{path.name}: left out {_listing(left_out)}, which are no images on a known grid")
    return layers


# Dates ----------------------------------------------------------------------------------------------------------------


def _parse_dates(dates: str | Path | Sequence[str | dt.date]) -> list[dt.date]:
    given: list[str | Path | dt.date] = [dates] if isinstance(dates, str | Path) else [*dates]
    if len(given) == 1 and not isinstance(given[0], dt.date):
        text = Path(given[0]).read_text("utf-8-sig") if Path(given[0]).is_file() else str(given[0])
        given = [*text.replace(",", " ").split()]
    try:
        return [day if isinstance(day, dt.date) else dt.date.fromisoformat(str(day).strip()[:10]) for day in given]
    except ValueError as error:
        raise InputError(f"--dates has something else than dates ({error}); write them as YYYY-MM-DD") from None


def _date_by_hand(layers: list[Layer], dates: list[dt.date], decisions: list[str]) -> list[Layer]:
    given = [NamedDate(date=day, how="--dates") for day in dates]
    timed = next((layer for layer in layers if any(d.how == TIME_AXIS for d in layer.dates)), None)
    if timed is not None:
        raise InputError(f"{timed.label} has a time axis of its own; leave --dates out")
    first = layers[0]
    if len(layers) == 1 and first.load is None and len(given) == len(first.names) > 1:
        decisions.append(f"{first.label}: its {len(given)} bands are one band at the {len(given)} dates given")
        parts = zip(first.names, first.indexes, given, strict=True)
        return [replace(first, names=(n or first.path.stem,), indexes=(i,), dates=(day,)) for n, i, day in parts]
    paths = list(dict.fromkeys(layer.path for layer in layers))
    if len(given) not in (1, len(paths)):
        raise InputError(
            f"--dates gives {len(given)} dates for {len(paths)} files; give one for all, or one per file in their order"
        )
    by_path = dict(zip(paths, given * (len(paths) if len(given) == 1 else 1), strict=True))
    return [replace(layer, dates=(by_path[layer.path],)) for layer in layers]


def _decide_dates(images: list[Image], decisions: list[str]) -> list[Image]:
    """Take the one date that a file gives; maps that tell none get the scene's first."""
    dated = []
    for image in images:
        days = sorted({found.date for found in image.layer.dates})
        if len(days) > 1:
            raise InputError(
                f"{image.layer.label} gives two dates, {days[0]} and {days[1]} (in its tags and its name); "
                "say which is right with --dates"
            )
        if days:
            dated.append(replace(image, date=days[0]))
    for how in dict.fromkeys(image.layer.dates[0].how for image in dated):
        alike = [image.layer for image in dated if image.layer.dates[0].how == how]
        decisions.append(f"{_among(alike)}: dated by {how}")
    first = min((image.date for image in dated), default=None)
    for image in [image for image in images if not image.layer.dates]:
        label = image.layer.label
        if image.modality == "srtm":
            dated.append(replace(image, date=SRTM_FLOWN))
            decisions.append(f"{label}: tells no date; taken as {SRTM_FLOWN}, the shuttle mission's")
        elif MODALITIES[image.modality].kind == "still" and first is not None:
            dated.append(replace(image, date=first))
            decisions.append(f"{label}: tells no date; a map, taken as {first}, the first date of the scene")
        else:
            raise InputError(f"neither the name nor the tags of {label} tell its date; give --dates YYYY-MM-DD")
    return dated


# Modalities, bands, units ---------------------------------------------------------------------------------------------


def _identify(
    layers: list[Layer], wanted: str | None, named: set[Path], decisions: list[str]
) -> list[tuple[Layer, tuple[str, ...]]]:
    """Find the modality of each layer; only between the two levels of Sentinel-2 the numbers are to decide."""
    found, left_out = [], []
    for layer in layers:
        if wanted is not None:
            options: tuple[str, ...] = (wanted,) if any(match_bands(layer.names, MODALITIES[wanted])) else ()
        else:
            options = candidates(layer.names, layer.text)
        if set(options) == {"naip", "naip_10"}:
            size = _pixel_m(layer.box)
            options = (min(options, key=lambda name: abs(math.log(size / MODALITIES[name].gsd))),)
            decisions.append(f"pixels of {size:.3g} m are nearest to {options[0]}; --modality overrules")
        if len(options) == 1 or set(options) == _SENTINEL2:
            found.append((layer, options))
        elif options:
            raise InputError(
                f"{layer.label} can be {', '.join(options[:-1])} or {options[-1]} by its bands "
                f"{_listing(layer.names)}; say which with --modality"
            )
        elif layer.path in named and layer.load is None and not words(" ".join(layer.names)) & AUXILIARY:
            raise InputError(_unknown(layer, wanted))
        else:
            left_out.append(layer.label)
    if left_out:
        decisions.append(f"left out, as their bands are no modality's: {_listing(list(dict.fromkeys(left_out)))}")
    if not found:
        raise InputError(_unknown(layers[0], wanted) if layers else "the files hold masks alone; add their images")
    return found


def _unknown(layer: Layer, wanted: str | None) -> str:
    names = [name for name in layer.names if name and name != layer.path.stem]
    has = f"the bands {_listing(names)}" if names else f"{len(layer.names)} band(s) without names"
    if wanted is not None:
        known = ", ".join(MODALITIES[wanted].band_names)
        return f"{layer.label} has {has}, none of {wanted}; name them with --bands, out of {known}"
    return f"{layer.label} has {has}, which tell no sensor; name them with --bands and the sensor with --modality"


def _pixel_m(box: GeoBox) -> float:
    side = math.sqrt(abs(box.affine.determinant))
    if box.crs is not None and box.crs.geographic:
        _, latitude = box.affine @ (box.shape.x / 2, box.shape.y / 2)
        return side * 111_320 * math.sqrt(math.cos(math.radians(latitude)))
    return side


def _decide_units(found: list[tuple[Layer, tuple[str, ...]]], unit: str | None, decisions: list[str]) -> list[Image]:
    """Decide unit, undeclared nodata and Sentinel-2's level from the numbers, for layers made alike at once."""
    if unit is not None and not any(unit in file_units(options[0]) for _, options in found):
        file_unit(found[0][1][0], unit)
    families: dict[tuple[Any, ...], list[Layer]] = {}
    for layer, options in found:
        families.setdefault((options, *_family(layer)), []).append(layer)
    images = []
    for (options, *_), layers in families.items():
        among, modality = _among(layers), "sentinel2_l2a" if set(options) == _SENTINEL2 else options[0]
        samples = [_sample(layers[i], modality) for i in spread(len(layers), SAMPLED)]
        hidden = _hidden_nodata(samples, layers[0], modality)
        if hidden is not None:
            decisions.append(f"{among}: {hidden:g}, which fills all bands of some pixels, is taken as nodata")
            layers = [replace(layer, nodata=hidden) for layer in layers]
            samples = [_sample(layers[i], modality) for i in spread(len(layers), SAMPLED)]
        numbers = np.concatenate([v[np.isfinite(v)] for sample in samples for v in sample.values()])
        if unit is not None and unit in file_units(modality):
            file, how = file_unit(modality, unit), "by --unit"
        else:
            file, how = _unit_of(among, modality, layers[0], numbers)
        if set(options) == _SENTINEL2:
            why = _level_2a(among, samples, file)
            decisions.append(f"{among}: Sentinel-2 surface reflectance, since {why}")
        if modality in _SENTINEL2 and _adds_offset(layers[0]):
            file, what = _without_offset(samples, file)
            decisions.append(f"{among}: {what}")
        images += [_image(layer, modality, file) for layer in layers]
        unused = [name for name in layers[0].names if match_bands([name], MODALITIES[modality]) == (None,)]
        left_out = f"; left out {_listing(unused)}" if unused and len(layers[0].names) > 1 else ""
        decisions.append(f"{among}: {modality} in {file.about}, {how}{left_out}")
    return images


def _image(layer: Layer, modality: str, unit: FileUnit) -> Image:
    # Power is never zero: where the logarithm of nothing would be taken, nothing was measured.
    nodata = 0.0 if unit.unit is not None and layer.nodata is None else layer.nodata
    bands = match_bands(layer.names, MODALITIES[modality])
    return Image(layer=replace(layer, nodata=nodata), modality=modality, bands=bands, unit=unit, date=SRTM_FLOWN)


def _family(layer: Layer) -> tuple[Any, ...]:
    container = "" if layer.load is None else layer.label
    return (layer.path.parent, layer.path.suffix, container, layer.dtype, _adds_offset(layer))


def _adds_offset(layer: Layer) -> bool:
    """Tell by the name of the product whether ESA added 1000 to the numbers."""
    baseline = processing_baseline(layer.path.resolve().as_posix())
    return baseline is not None and baseline >= (4, 0)


def _without_offset(samples: list[dict[str, Numbers]], unit: FileUnit) -> tuple[FileUnit, str]:
    """Take away the 1000 that a product's baseline adds, unless the numbers show that somebody already did."""
    bands = {band for sample in samples for band in sample}
    pooled = {band: np.concatenate([s[band] for s in samples if band in s]) for band in bands}
    found = offset_kept({band: to_declared("sentinel2_l2a", values, unit) for band, values in pooled.items()})
    if found in ("removed", "removed twice"):
        return (
            unit,
            "its processing baseline adds 1000, but its darkest numbers show that it was taken away: left as it is",
        )
    return replace(unit, offset=unit.offset - 1000), "its processing baseline adds 1000, which is taken away"


def _unit_of(among: str, modality: str, layer: Layer, numbers: Numbers) -> tuple[FileUnit, str]:
    fitting = plausible_units(modality, numbers)
    if numbers.size == 0:
        return file_unit(modality, fitting[0]), "assumed, as the sample is all nodata"
    low, high = np.percentile(numbers, (2, 98))
    if len(fitting) == 1:
        return file_unit(modality, fitting[0]), f"by its numbers, mostly {low:.4g} to {high:.4g}"
    units = ", ".join(file_units(modality))
    if fitting:
        raise InputError(f"{among}: {low:.4g} to {high:.4g} can be {' or '.join(fitting)}; say which with --unit")
    why = "8-bit pictures hold no measurements; " if layer.dtype == np.uint8 else ""
    raise InputError(
        f"{among}: numbers of mostly {low:.4g} to {high:.4g} are not {modality} in any known unit ({units}); {why}"
        "take the measured product, or say which unit it is with --unit"
    )


def _level_2a(among: str, samples: list[dict[str, Numbers]], unit: FileUnit) -> str:
    """Say why a Sentinel-2 image without a stated level is surface reflectance."""
    if {band for sample in samples for band in sample} >= set(MODALITIES["sentinel2_l2a"].band_names):
        return "there are all 12 bands of level 2A and no B10"
    blue = np.concatenate([sample["B02"] for sample in samples if "B02" in sample] or [np.empty(0)])
    blue = to_declared("sentinel2_l2a", blue[np.isfinite(blue)], unit)
    if blue.size and np.percentile(blue, 0.5) < DARKEST_AIR:
        return f"the darkest blue, {np.percentile(blue, 0.5):.0f}, is darker than the air above it"
    raise InputError(
        f"{among} can be Sentinel-2 of level 2A or 1C; say which with --modality sentinel2_l2a or --modality sentinel2"
    )


def _sample(layer: Layer, modality: str) -> dict[str, Numbers]:
    """Read up to nine windows of each band that the modality has: raw numbers, NaN where nodata."""
    if layer.load is not None:
        every = max(1, max(layer.box.shape) // 256)
        pixels = layer.load()[:, ::every, ::every]
        raw = pixels.reshape(len(pixels), -1).astype(np.float64)
    else:
        with rasterio.open(layer.path) as source:
            windows = sample_windows(source.height, source.width)
            parts = [source.read(list(layer.indexes), window=w).reshape(len(layer.indexes), -1) for w in windows]
        raw = np.concatenate(parts, axis=1).astype(np.float64)
    if layer.nodata is not None:
        raw[raw == layer.nodata] = np.nan
    bands = match_bands(layer.names, MODALITIES[modality])
    scaled = raw * layer.scale + layer.offset
    return {band: scaled[i] for i, band in enumerate(bands) if band is not None}


def sample_windows(height: int, width: int, size: int = 128) -> list[Window]:
    """Spread nine windows over a raster; one, the whole of it, where it is small."""
    if max(height, width) <= 3 * size:
        return [Window(0, 0, width, height)]
    rows = sorted({int(r) for r in np.linspace(0, max(height - size, 0), 3)})
    cols = sorted({int(c) for c in np.linspace(0, max(width - size, 0), 3)})
    return [Window(col, row, min(size, width), min(size, height)) for row in rows for col in cols]


def spread(count: int, most: int) -> list[int]:
    """Choose up to `most` of `count` places evenly, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))})


def _hidden_nodata(samples: list[dict[str, Numbers]], layer: Layer, modality: str) -> float | None:
    """Find the usual value that fills all bands of more than a thousandth of the pixels, where none is declared."""
    if layer.nodata is not None:
        return None
    usual = {MODALITIES[modality].nodata, *_NODATA.get(layer.dtype.name, (-9999,))}
    images = [np.stack(list(sample.values())) for sample in samples]
    total = sum(image.shape[1] for image in images)
    for value in sorted(v for v in usual if v is not None):
        if sum(np.count_nonzero((image == value).all(axis=0)) for image in images) > total / 1000:
            return float(value)
    return None


# Items ----------------------------------------------------------------------------------------------------------------


def _group(images: list[Image], decisions: list[str]) -> dict[str, list[Image]]:
    """Gather images of one modality, date and footprint under the id of their item; repeats are left out."""
    places: dict[tuple[str, dt.date], list[list[Image]]] = {}
    repeats = []
    for image in images:
        known = places.setdefault((image.modality, image.date), [])
        same = [group for group in known if same_ground(group[0].layer.box, image.layer.box)]
        free = [group for group in same if not _bands(group) & _bands([image])]
        if free:
            free[0].append(image)
        elif any(_bands([image]) <= _bands(group) for group in same):
            repeats.append(image.layer.label)
        else:
            known.append([image])
    if repeats:
        names = _listing(list(dict.fromkeys(repeats)))
        decisions.append(f"left out, as others show the same place, date and bands: {names}")
    return {
        f"{modality}_{date}" + (f"_{number}" if len(known) > 1 else ""): group
        for (modality, date), known in places.items()
        for number, group in enumerate(known, start=1)
    }


def _bands(images: Iterable[Image]) -> set[str]:
    return {band for image in images for band in image.bands if band is not None}


def same_ground(one: GeoBox, other: GeoBox) -> bool:
    """Tell whether two grids cover the same ground, but for a pixel of the coarser."""
    if one.crs != other.crs:
        return False
    reach = max(abs(one.affine.a), abs(other.affine.a)) * 1.01
    return all(abs(a - b) < reach for a, b in zip(one.boundingbox, other.boundingbox, strict=True))


def _write_item(name: str, group: list[Image], masks: list[Layer], out: Path, copy: bool) -> pystac.Item:
    modality, date = group[0].modality, group[0].date
    folder = out / modality
    assets: dict[str, SceneAsset | str | Path] = {}
    for image in group:
        key = "data" if len(group) == 1 else "_".join(sorted(_bands([image])))
        path = folder / f"{name}{'' if len(group) == 1 else f'_{key}'}.tif"
        path, indexes = _place(image.layer, image.bands, path, copy)
        assets[key] = SceneAsset(href=str(path), bands=_scene_bands(image, indexes))
    finest = min((image.layer.box for image in group), key=lambda box: abs(box.affine.determinant))
    clouds = [m for m in masks if m.dates and m.dates[0].date == date and same_ground(m.box, finest)]
    if clouds and modality in _SENTINEL2:
        assets["scl"], _ = _place(clouds[0], ("SCL",), folder / f"{name}_scl.tif", copy)
    return make_item(name, modality, date, finest, assets)


def _scene_bands(image: Image, indexes: Sequence[int]) -> tuple[SceneBand, ...]:
    layer, unit = image.layer, image.unit
    return in_file_order(
        SceneBand(
            name=band,
            index=index,
            nodata=layer.nodata,
            scale=layer.scale * unit.scale,
            offset=layer.offset * unit.scale + unit.offset,
            unit=unit.unit,
        )
        for index, band in zip(indexes, image.bands, strict=True)
        if band is not None
    )


def in_file_order(bands: Iterable[SceneBand]) -> tuple[SceneBand, ...]:
    """List the bands of a file in their order, as STAC's `bands` wants, with names of no band for those between."""
    known = {band.index: band for band in bands}
    return tuple(known.get(i, SceneBand(name=f"unused {i}", index=i)) for i in range(1, max(known) + 1))


def _place(layer: Layer, bands: Sequence[str | None], path: Path, copy: bool) -> tuple[Path, Sequence[int]]:
    """Put a layer into a COG of the scene unless its raster may stay; return the file and where the bands are in it."""
    if layer.load is None and not copy:
        return layer.path.resolve(), layer.indexes
    if path.resolve() == layer.path.resolve():
        raise InputError(f"{path} would be written over itself; choose another folder for the scene")
    names = tuple(name or f"band {index}" for name, index in zip(layer.names, layer.indexes, strict=True))
    in_order = range(1, len(names) + 1)
    if layer.load is not None:
        return write_cog(path, layer.load(), layer.box, nodata=layer.nodata, band_names=names), in_order
    with rasterio.open(layer.path) as source:
        used = {index for index, band in zip(layer.indexes, bands, strict=True) if band is not None}
        alpha = {i for i, meaning in enumerate(source.colorinterp, start=1) if meaning == ColorInterp.alpha}
        if source.gcps[0] or alpha - used or any(flags == [MaskFlags.per_dataset] for flags in source.mask_flag_enums):
            return _copy_whole(source, path), layer.indexes
        with CogWriter(path, layer.box, len(names), layer.dtype, nodata=layer.nodata, band_names=names) as writer:
            for window in _blocks(source.height, source.width):
                writer.write(window, source.read(list(layer.indexes), window=window))
    return path, in_order


def _copy_whole(source: rasterio.DatasetReader, path: Path) -> Path:
    """Copy a file with what only GDAL carries over: control points and masks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as partial:
        rasterio.shutil.copy(source, partial, driver="COG", blocksize=512, compress="DEFLATE", predictor="YES")
    return path


def _blocks(height: int, width: int, size: int = 1024) -> Iterator[Window]:
    for row in range(0, height, size):
        for col in range(0, width, size):
            yield Window(col, row, min(size, width - col), min(size, height - row))


# Words ----------------------------------------------------------------------------------------------------------------


def _among(layers: Sequence[Layer]) -> str:
    """Name some layers by the first of them."""
    labels = list(dict.fromkeys(layer.label for layer in layers))
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"


def _listing(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(name or "(no name)" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
