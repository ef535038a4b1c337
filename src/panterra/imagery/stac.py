"""A scene: what was seen, where and when."""

from __future__ import annotations

import datetime as dt
import functools
import json
import math
import os
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urljoin

import numpy as np
import pystac
import torch
from affine import Affine
from odc.geo import CRS
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.files import write_whole
from panterra.imagery.declared import DECLARED, declare_tables
from panterra.imagery.foreign_items import foreign_item
from panterra.imagery.grids import bounds_in, common_crs, footprint, lonlat
from panterra.imagery.items import (
    CONVERSIONS,
    INDEX,
    MASKS,
    MODALITY,
    OWN_MASKS,
    SceneAsset,
    SceneBand,
    SceneItem,
    date_of,
    resolve,
)
from panterra.imagery.raster import Bools, Floats, grid_of, read_onto
from panterra.modalities import MODALITIES, Modality
from panterra.sample import Batch, Observation, to_days

SCENE_FILE = "scene.json"

DECLARATIONS = "panterra:modalities"
"""The member of an ItemCollection that declares modalities which somebody added, see `declared.declare_tables`."""

READERS = 32
"""Threads that read files, shared by all scenes: GDAL lets go of Python's lock while it waits and decodes."""

AHEAD = 4
"""Items whose masks, and as many whose bands, `Scene.read` has in hand while it waits for one."""

T = TypeVar("T")

Reading = Callable[[], tuple[Floats, Bools]]
"""Waits for files and returns their pixels [C, H, W] and where these are data [H, W]."""

SUBSTITUTES = {
    "sentinel2_l2a": {"B01": "B02", "B09": "B8A", "B8A": "B08", "B08": "B8A"},
    "sentinel2": {"B01": "B02", "B09": "B8A", "B8A": "B08", "B08": "B8A", "B10": "B11"},
}
"""The band that stands in for an absent one: the nearest in wavelength, as the models' published evaluations do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Items that belong together; reading it makes a `Batch`. Safe to read from several threads."""

    items: tuple[SceneItem, ...]
    title: str | None = None
    licence: str | None = None
    unsupported: tuple[str, ...] = ()
    """Items that came but cannot be used, one sentence each."""
    fill_missing_bands: bool = True
    """Whether `SUBSTITUTES` stand in for absent bands; without, reading them is an error."""
    apply_masks: bool = True
    """Whether pixels under cloud and its shadow are invalid, where an item has a mask."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What was seen, in the order of `MODALITIES`."""
        present = {item.modality for item in self.items}
        return tuple(name for name in MODALITIES if name in present)

    def dates(self, modality: str) -> tuple[dt.date, ...]:
        """Return the dates that `read` gives, in order: one for a still image, the newest."""
        dates = tuple(sorted({item.date for item in self._of(modality)}))
        return dates if MODALITIES[modality].kind != "still" else dates[-1:]

    def missing_bands(self, modality: str) -> tuple[str, ...]:
        """Return the bands that at least one item of a modality lacks."""
        items = self._of(modality)
        return tuple(name for name in MODALITIES[modality].band_names if any(name not in i.bands for i in items))

    def geobox(self, resolution: float = 10.0, modality: str | None = None, *, crs: CRS | None = None) -> GeoBox:
        """Return the smallest grid over the items of a modality, on the pixel edges of the files.

        Without a modality these are all series of images, or all items where there is none. The CRS is the one given,
        or else that which `common_crs` chooses: the UTM zone with most of the area.
        """
        if modality is None:
            series = tuple(item for item in self.items if MODALITIES[item.modality].kind == "series")
            items = series or self.items
        else:
            items = self._of(modality)
        grids = [item.grid or _grid_of_files(item) for item in items]
        crs = crs if crs is not None else common_crs(grids)
        anchors = [grid for grid in grids if grid.crs == crs and _north_up(grid)]
        nearest = min(anchors, key=lambda grid: abs(math.log(abs(grid.affine.a) / resolution)), default=None)
        x0, y0 = (nearest.affine.c, nearest.affine.f) if nearest is not None else (0.0, 0.0)
        edges = np.array([bounds_in(grid, crs) for grid in grids])
        if not np.isfinite(edges).all():
            raise InputError(f"parts of the scene lie where {crs} cannot show them; choose another CRS")
        # A box may begin a millionth of a pixel inside: coordinates in files are rounded.
        left = math.floor((edges[:, 0].min() - x0) / resolution + 1e-6)
        right = math.ceil((edges[:, 2].max() - x0) / resolution - 1e-6)
        bottom = math.floor((edges[:, 1].min() - y0) / resolution + 1e-6)
        top = math.ceil((edges[:, 3].max() - y0) / resolution - 1e-6)
        corner = Affine(resolution, 0, x0 + left * resolution, 0, -resolution, y0 + top * resolution)
        return GeoBox((max(top - bottom, 1), max(right - left, 1)), corner, crs)

    def read(self, modality: str, box: GeoBox) -> Observation:
        """Read one modality over a box of the common grid, in its declared unit.

        A modality finer than the common grid has that many times more pixels; a coarser one is brought to the grid.
        Items of one date are laid over each other in the order of the scene, the first valid pixel wins; so are all
        items of a still image, the newest first. A pixel is valid where every band is. Bands are not read where the
        mask of their item leaves nothing of the box.
        """
        spec, items = MODALITIES[modality], self._of(modality)
        dates = self.dates(modality)
        grid = modality_grid(spec, box)
        if spec.kind == "still":
            layers = [sorted(items, key=lambda item: item.date, reverse=True)]
        else:
            layers = [[item for item in items if item.date == date] for date in dates]
        pixels = np.zeros((len(dates), len(spec.bands), *grid.shape), np.float32)
        valid = np.zeros((len(dates), *grid.shape), np.bool_)

        def lay(step: int, values: Floats, seen: Bools) -> None:
            fresh = seen & ~valid[step]
            np.copyto(pixels[step], values, where=fresh)
            valid[step] |= fresh

        there = ((step, item) for step, layer in enumerate(layers) for item in layer if _touches(item, grid))
        asked = ((step, self._ask(item, spec, grid)) for step, item in there)
        for step, finish in _early((step, begin()) for step, begin in _early(asked)):
            if finish is not None:
                lay(step, *finish())
        return Observation(
            pixels=torch.from_numpy(pixels)[None],
            dates=torch.tensor([[to_days(date) for date in dates]], dtype=torch.int64),
            valid=torch.from_numpy(valid)[None],
        )

    def batch(self, box: GeoBox, modalities: Sequence[str] | None = None) -> Batch:
        """Read every modality of the scene, or the named ones that it has, over a box of the common grid."""
        names = [name for name in self.modalities if modalities is None or name in modalities]
        if not names:
            wanted = ", ".join(modalities or ())
            raise InputError(f"the scene holds {', '.join(self.modalities)}; none of the wanted {wanted}")
        return Batch(
            observations={name: self.read(name, box) for name in names},
            lonlat=torch.tensor([_centre(box)], dtype=torch.float64),
            pixel_m=pixel_metres(box),
        )

    def _of(self, modality: str) -> tuple[SceneItem, ...]:
        items = tuple(item for item in self.items if item.modality == modality)
        if not items:
            raise InputError(f"the scene has no {modality}; it holds {', '.join(self.modalities)}")
        return items

    def _ask(self, item: SceneItem, spec: Modality, grid: GeoBox) -> Callable[[], Reading | None]:
        """Begin to read the mask of an item; the answer waits for it, and is None where nothing is to be seen."""
        if item.mask is None or not self.apply_masks:
            return lambda: self._start(item, spec, grid, np.ones(grid.shape, np.bool_))
        mask = _submit(item.mask[0], _read_mask, item.mask[1], grid)
        return lambda: self._start(item, spec, grid, mask.result()) if mask.result().any() else None

    def _start(self, item: SceneItem, spec: Modality, grid: GeoBox, seen: Bools) -> Reading:
        """Begin to read the files of an item; the answer waits for them and returns pixels [C, H, W] and [H, W]."""
        sources = self._sources(item, spec)
        wanted = set(sources.values())
        jobs = []
        for asset in item.assets:
            bands = tuple(band for band in asset.bands if band.name in wanted)
            if bands:
                jobs.append((bands, _submit(asset.href, _read_asset, bands, spec, grid)))

        def finish() -> tuple[Floats, Bools]:
            found: dict[str, Floats] = {}
            everywhere = seen
            for bands, job in jobs:
                values, valid = job.result()
                found |= {band.name: values[i] for i, band in enumerate(bands)}
                everywhere = everywhere & valid
            return np.stack([found[sources[name]] for name in spec.band_names]), everywhere

        return finish

    def _sources(self, item: SceneItem, spec: Modality) -> dict[str, str]:
        """Decide which band of an item serves each band of the modality."""
        present, chosen, missing = set(item.bands), {}, []
        for name in spec.band_names:
            source = name
            stand_ins = SUBSTITUTES.get(spec.name, {}) if self.fill_missing_bands else {}
            for _ in range(2):
                source = stand_ins.get(source, source) if source not in present else source
            if source not in present:
                missing.append(name)
            chosen[name] = source
        if missing:
            raise InputError(
                f"item {item.id} lacks {', '.join(missing)} of {spec.name}, for which no other band may stand in; "
                f"add the files of these bands, or leave {spec.name} out by naming the other modalities"
            )
        return chosen


def open_scene(
    path_or_items: str | Path | Iterable[pystac.Item | Mapping[str, Any]] | pystac.Item | Mapping[str, Any],
    *,
    modalities: Sequence[str] | None = None,
    fill_missing_bands: bool = True,
    apply_masks: bool = True,
) -> Scene:
    """Open a folder with `scene.json`, a STAC Item or ItemCollection (file, http address, objects) as a scene.

    Modalities that the collection declares are known from then on. Only the named ones are kept, all by default. Items
    that cannot be used are named in `Scene.unsupported`; when there is no other, that is an error.
    """
    content, base = _load(path_or_items)
    if DECLARATIONS in content:
        declare_tables(content[DECLARATIONS], source=_name(path_or_items))
    unknown = [name for name in modalities or () if name not in MODALITIES]
    if unknown:
        raise InputError(f"no modality {unknown[0]!r}; known: {', '.join(sorted(MODALITIES))}")
    items, unsupported = [], []
    for raw in content["features"]:
        try:
            item = parse_item(raw, base=base, prefer=modalities or ())
        except InputError as error:
            unsupported.append(str(error))
            continue
        if modalities is None or item.modality in modalities:
            items.append(item)
    if not items:
        if unsupported:
            more = f" (and {len(unsupported) - 1} more)" if len(unsupported) > 1 else ""
            raise InputError(f"no item of {_name(path_or_items)} can be used: {unsupported[0]}{more}")
        raise InputError(f"{_name(path_or_items)} holds no item of {', '.join(modalities or ()) or 'any modality'}")
    return Scene(
        items=tuple(items),
        title=content.get("title"),
        licence=content.get("license") or _common_licence(content["features"]),
        unsupported=tuple(unsupported),
        fill_missing_bands=fill_missing_bands,
        apply_masks=apply_masks,
    )


def make_item(
    id: str,
    modality: str,
    date: dt.date | str,
    box: GeoBox,
    assets: Mapping[str, SceneAsset | str | Path],
) -> pystac.Item:
    """Describe files of one modality and date as a STAC item.

    An asset given as a plain path is a mask where its key is one of `OWN_MASKS`, that one band where the key names a
    band, else a file with all bands of the modality in order, in the declared unit.
    """
    spec = MODALITIES[modality]
    day = dt.date.fromisoformat(date[:10]) if isinstance(date, str) else date
    geometry, bbox = footprint(box)
    item = pystac.Item(
        id=id,
        geometry=geometry,
        bbox=bbox,
        datetime=dt.datetime(day.year, day.month, day.day, tzinfo=dt.UTC),
        properties={
            MODALITY: modality,
            **_crs_note(box.crs),
            "proj:shape": [int(n) for n in box.shape],
            "proj:transform": [float(n) for n in box.affine][:6],
        },
        stac_extensions=["https://stac-extensions.github.io/projection/v2.0.0/schema.json"],
    )
    for key, given in assets.items():
        asset = given if isinstance(given, SceneAsset) else _plain_asset(spec, key, given)
        item.add_asset(
            key,
            pystac.Asset(
                href=asset.href,
                media_type=pystac.MediaType.COG if asset.href.endswith(".tif") else None,
                roles=["data"] if asset.bands else ["data-mask"],
                extra_fields={"bands": [_band_dict(b, i, spec) for i, b in enumerate(asset.bands, 1)]}
                if asset.bands
                else {},
            ),
        )
    bands = [band for asset in item.assets.values() for band in asset.extra_fields.get("bands", ())]
    for extension in ("eo", "raster"):
        if any(key.startswith(f"{extension}:") for band in bands for key in band):
            item.stac_extensions.append(f"https://stac-extensions.github.io/{extension}/v2.0.0/schema.json")
    return item


def save_scene(folder: str | Path, items: Sequence[pystac.Item], title: str, licence: str | None) -> Path:
    """Write `scene.json` into a folder; files below the folder are named relative to it.

    What was declared of the items' modalities goes along, so that whoever opens the scene knows them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    features = []
    for item in items:
        feature = item.to_dict(include_self_link=False, transform_hrefs=False)
        for asset in feature["assets"].values():
            asset["href"] = _relative(asset["href"], folder)
        features.append(feature | {"links": []})
    content: dict[str, Any] = {"type": "FeatureCollection", "title": title}
    content |= {"license": licence} if licence else {}
    seen = dict.fromkeys(item.properties.get(MODALITY) for item in items)
    if tables := {name: DECLARED[name] for name in seen if name in DECLARED}:
        content[DECLARATIONS] = tables
    return write_whole(folder / SCENE_FILE, json.dumps(content | {"features": features}, indent=1))


def parse_item(raw: Mapping[str, Any], *, base: str | None = None, prefer: Sequence[str] = ()) -> SceneItem:
    """Understand one STAC item, ours or a known provider's; `base` is the folder or address its hrefs start from.

    `prefer` chooses where a collection can serve several modalities, as NAIP does.
    """
    name = raw.get("id", "without id")
    properties = raw.get("properties", {})
    if not raw.get("assets"):
        raise InputError(f"item {name} has no assets; ask the catalogue for whole items, not for chosen fields")
    item = _own_item(raw, base) if MODALITY in properties else foreign_item(raw, base, prefer)
    return replace(item, grid=_grid_of_item(raw, item, base))


# Our own items --------------------------------------------------------------------------------------------------------


def _own_item(raw: Mapping[str, Any], base: str | None) -> SceneItem:
    modality = raw["properties"][MODALITY]
    if modality not in MODALITIES:
        raise InputError(f"item {raw['id']} is of the unknown modality {modality!r}; known: {', '.join(MODALITIES)}")
    spec = MODALITIES[modality]
    assets: list[SceneAsset] = []
    mask = None
    others: list[str] = []
    for key, asset in raw["assets"].items():
        href = resolve(asset["href"], base)
        notes = asset.get("bands") or []
        if not notes and key.lower() in OWN_MASKS:
            mask = (href, OWN_MASKS[key.lower()])
        bands = tuple(_own_band(raw["id"], note, i, spec) for i, note in enumerate(notes, start=1))
        others += [band.name for band in bands if band.name not in spec.band_names]
        bands = tuple(band for band in bands if band.name in spec.band_names)
        if bands:
            assets.append(SceneAsset(href=href, bands=bands))
    decisions = (f"not bands of {modality}, left out: {', '.join(others)}",) if others else ()
    if not assets:
        raise InputError(f"item {raw['id']} names no band of {modality}; its assets need bands[] with names")
    return SceneItem(
        id=raw["id"], modality=modality, date=date_of(raw), assets=tuple(assets), mask=mask, decisions=decisions
    )


def _own_band(item: str, note: Mapping[str, Any], index: int, spec: Modality) -> SceneBand:
    unit = note.get("unit")
    if unit not in (None, spec.unit) and (unit, spec.unit) not in CONVERSIONS:
        known = ", ".join([spec.unit, *(a for a, b in CONVERSIONS if b == spec.unit)])
        raise InputError(f"item {item} has {note.get('name')} in {unit!r}; {spec.name} can be read from {known}")
    nodata = note.get("nodata")
    return SceneBand(
        name=str(note.get("name")),
        index=int(note.get(INDEX, index)),
        nodata=None if nodata is None else float(nodata),
        scale=note.get("raster:scale"),
        offset=note.get("raster:offset"),
        unit=unit,
    )


def _band_dict(band: SceneBand, place: int, spec: Modality) -> dict[str, Any]:
    """Describe the band at a place of the list, counted from 1; its index in the file where that is another one."""
    known = next((b for b in spec.bands if b.name == band.name), None)
    stated = {
        "name": band.name,
        "eo:common_name": known.common if known else None,
        "eo:center_wavelength": known.wavelength if known else None,
        INDEX: band.index if band.index != place else None,
        "unit": band.unit or spec.unit,
        # JSON has no NaN: STAC spells it as a string.
        "nodata": band.nodata if band.nodata is None or math.isfinite(band.nodata) else str(band.nodata),
        "raster:scale": band.scale,
        "raster:offset": band.offset,
    }
    return {key: value for key, value in stated.items() if value is not None}


def _crs_note(crs: CRS | None) -> dict[str, Any]:
    if crs is None:
        raise InputError("the box has no coordinate reference system; give it one")
    return {"proj:code": f"EPSG:{crs.epsg}"} if crs.epsg else {"proj:wkt2": crs.to_wkt()}


def _plain_asset(spec: Modality, key: str, path: str | Path) -> SceneAsset:
    if key in OWN_MASKS:
        names: tuple[str, ...] = ()
    else:
        names = (key,) if key in spec.band_names else spec.band_names
    return SceneAsset(href=str(path), bands=tuple(SceneBand(name=n, index=i) for i, n in enumerate(names, start=1)))


# Reading --------------------------------------------------------------------------------------------------------------


def modality_grid(spec: Modality, box: GeoBox) -> GeoBox:
    """Return the grid of a modality over a box of the common grid: finer where it is finer, one pixel for weather."""
    height, width = box.shape
    if spec.kind == "weather":
        rows, cols = 1, 1
    else:
        finer = max(10.0 / spec.gsd, 1.0) if spec.gsd else 1.0
        rows, cols = round(height * finer), round(width * finer)
    return GeoBox((rows, cols), box.affine @ Affine.scale(width / cols, height / rows), box.crs)


def pixel_metres(box: GeoBox) -> float:
    """Return the side of a pixel in metres."""
    if box.crs is None or not box.crs.projected:
        raise InputError(f"the box is in {box.crs}; give one in a projected CRS, as Scene.geobox() does")
    factor = box.crs.proj.axis_info[0].unit_conversion_factor
    return float(math.sqrt(abs(box.affine.determinant)) * factor)


@functools.cache
def _reader(process: int, number: int) -> ThreadPoolExecutor:
    """Return a thread of this process: none survives a fork, such as data loaders make."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"panterra-read-{number}")


def _early(things: Iterable[T]) -> Iterator[T]:
    """Ask for `AHEAD` things before the first is given."""
    held: deque[T] = deque()
    for thing in things:
        held.append(thing)
        if len(held) > AHEAD:
            yield held.popleft()
    yield from held


def _submit(href: str, read: Callable[..., T], *how: Any) -> Future[T]:
    """Read a file in the thread that always reads it, so that it is open, and its blocks are cached, once."""
    return _reader(os.getpid(), zlib.crc32(href.encode()) % READERS).submit(read, href, *how)


def _read_asset(href: str, bands: Sequence[SceneBand], spec: Modality, grid: GeoBox) -> tuple[Floats, Bools]:
    """Read some bands of one file in the declared unit: pixels [C, H, W] and where all of them are data."""
    values = np.empty((len(bands), *grid.shape), np.float32)
    seen = np.ones(grid.shape, np.bool_)
    alike: dict[SceneBand, list[int]] = {}
    for place, band in enumerate(bands):
        alike.setdefault(replace(band, name="", index=1), []).append(place)
    for how, places in alike.items():
        pixels, valid = read_onto(
            href,
            grid,
            bands=[bands[i].index for i in places],
            categorical=spec.categorical,
            nodata=how.nodata,
            scale=how.scale,
            offset=how.offset,
        )
        if how.unit not in (None, spec.unit):
            pixels = CONVERSIONS[str(how.unit), spec.unit](pixels)
        values[places] = pixels
        seen &= valid.all(0)
    return values, seen & np.isfinite(values).all(0)


def _read_mask(href: str, kind: str, grid: GeoBox) -> Bools:
    codes, known = read_onto(href, grid, categorical=True, bands=[1], scale=1.0, offset=0.0)
    return cast(Bools, MASKS[kind](codes[0]) & known[0])


# Where things are -----------------------------------------------------------------------------------------------------


def _touches(item: SceneItem, box: GeoBox) -> bool:
    """Tell whether an item may have pixels in a box; True where that is not known."""
    if item.grid is None:
        return True
    left, bottom, right, top = bounds_in(item.grid, box.crs)
    if not all(map(math.isfinite, (left, bottom, right, top))):
        return True
    west, south, east, north = box.boundingbox
    # Interpolation reaches a pixel beyond the item's edge.
    reach = abs(box.affine.a) + abs(box.affine.b)
    return left < east + reach and right > west - reach and bottom < north + reach and top > south - reach


def _centre(box: GeoBox) -> list[float]:
    height, width = box.shape
    x, y = box.affine @ (width / 2, height / 2)
    (lon,), (lat,) = lonlat(box.crs, [x], [y])
    return [lon, lat]


def _north_up(grid: GeoBox) -> bool:
    return bool(grid.affine.b == 0 and grid.affine.d == 0 and grid.affine.e < 0)


def _grid_of_files(item: SceneItem) -> GeoBox:
    return min((grid_of(asset.href) for asset in item.assets), key=lambda grid: abs(grid.affine.determinant))


def _grid_of_item(raw: Mapping[str, Any], item: SceneItem, base: str | None) -> GeoBox | None:
    """Read the projection extension, of the assets in use or of the item."""
    used = {asset.href for asset in item.assets}
    notes = [a for a in raw["assets"].values() if resolve(a["href"], base) in used]
    grids = []
    for note in (*notes, {}):
        stated: dict[str, Any] = raw["properties"] | note
        crs = stated.get("proj:code") or stated.get("proj:epsg") or stated.get("proj:wkt2")
        shape, place = stated.get("proj:shape"), stated.get("proj:transform")
        if crs and shape and place:
            crs = f"EPSG:{crs}" if isinstance(crs, int) else crs
            grids.append(GeoBox(tuple(shape), Affine(*place[:6]), CRS(crs)))
    return min(grids, key=lambda grid: abs(grid.affine.determinant), default=None)


# JSON -----------------------------------------------------------------------------------------------------------------


def _load(source: Any) -> tuple[dict[str, Any], str | None]:
    """Return an ItemCollection as a dict, and the folder or address from which its hrefs start."""
    if isinstance(source, str | Path):
        content, base = _load_path(str(source))
    else:
        many = [source] if isinstance(source, pystac.Item | Mapping) else list(source)
        content = {"type": "FeatureCollection", "features": [_as_dict(item) for item in many]}
        base = None
        if len(many) == 1 and content["features"][0].get("type") == "FeatureCollection":
            content = content["features"][0]
    if content.get("type") == "Feature":
        content = {"type": "FeatureCollection", "features": [content]}
    if content.get("type") != "FeatureCollection" or not isinstance(content.get("features"), list):
        raise InputError(f"{_name(source)} is a {content.get('type')}; wanted a STAC Item or ItemCollection")
    return content, base


def _load_path(name: str) -> tuple[dict[str, Any], str]:
    if name.startswith(("http://", "https://")):
        address = name if name.split("?")[0].endswith("json") else urljoin(name.rstrip("/") + "/", SCENE_FILE)
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                return _decode(answer.read(), address), address
        except (urllib.error.URLError, TimeoutError) as error:
            raise InputError(f"cannot fetch {address}: {getattr(error, 'reason', error)}") from error
    path = Path(name)
    file = path / SCENE_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"there is no {file}; give a folder with {SCENE_FILE} or a STAC file, "
            "or make one from rasters with `panterra fetch --from-files`"
        )
    return _decode(file.read_bytes(), name), str(file.resolve())


def _decode(content: bytes, name: str) -> dict[str, Any]:
    try:
        decoded = json.loads(content)
    except ValueError:
        decoded = None
    if not isinstance(decoded, dict):
        raise InputError(
            f"{name} is not a STAC Item or ItemCollection in JSON; make a scene from rasters with "
            "`panterra fetch --from-files`"
        )
    return decoded


def _as_dict(item: pystac.Item | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(item, pystac.Item):
        return dict(item)
    content = item.to_dict(include_self_link=False, transform_hrefs=False)
    for key, asset in item.assets.items():
        content["assets"][key]["href"] = asset.get_absolute_href() or asset.href
    return content


def _relative(href: str, folder: Path) -> str:
    if "://" in href or href.startswith("/vsi"):
        return href
    if not Path(href).is_absolute() and (folder / href).exists():
        return href
    # Not resolve(), which would follow links out of the folder.
    path, home = Path(href).absolute(), folder.absolute()
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)


def _common_licence(features: Sequence[Mapping[str, Any]]) -> str | None:
    told = [feature.get("properties", {}) for feature in features]
    stated = {properties.get("panterra:licence", properties.get("license")) for properties in told}
    return stated.pop() if len(stated) == 1 else None


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the list of items"
