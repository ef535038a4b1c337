"""What a map will take, said before it is made."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from odc.geo.geobox import GeoBox

from panterra.energy.grid import local_grid
from panterra.energy.impact import Figure, Impact, exactly, impact, local_site
from panterra.energy.ledger import Note, read_ledger
from panterra.energy.meter import peak_memory_gb
from panterra.errors import InputError
from panterra.evaluate.probes import Probe
from panterra.finetune.model import FineTuned
from panterra.imagery.items import SceneItem
from panterra.imagery.stac import Scene, modality_grid, open_scene
from panterra.imagery.wish import Plan as Wanted
from panterra.mapping.areas import Area, read_area
from panterra.mapping.clear import Clear, clear_observations, stated_clear
from panterra.mapping.effort import Speed, device_of, known_speed, model_of
from panterra.mapping.embeddings import Dtype
from panterra.mapping.probing import as_probe, check_fit, encoding_for
from panterra.mapping.sinks import map_nodata
from panterra.mapping.sources import Encoding
from panterra.mapping.tiles import Window
from panterra.mapping.trials import measure_speed, try_pixels
from panterra.modalities import MODALITIES
from panterra.models import weights
from panterra.models.features import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Imagery:
    """What of one modality is used."""

    modality: str
    items: int
    dates: tuple[str, ...]
    clear: Clear | None
    """None for what is not a series of images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Bytes, exact but for files."""

    files: int | None
    """Of the files that are read, whole, with their masks; None where some are not on this machine."""
    decoded: int
    """Of the pixels that are handed on, in float32; where tiles overlap, twice."""
    transferred: int
    """At most, where files are read over a network: the same pixels with 16 bits each, uncompressed. Of imagery that is
    to be fetched: what that takes."""
    written: int
    """Of the results, uncompressed; files are smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What things cost; amounts in one currency."""

    currency: str
    per_kwh: float = 0.0
    """Of the data centre, so that the PUE counts."""
    per_machine_hour: float = 0.0
    per_gb_egress: float = 0.0
    """Of imagery that is read: 10^9 bytes."""
    per_gb_month: float = 0.0
    """Of results that are kept."""
    months: float = 1.0
    """How long they are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPlan:
    """A map, or embeddings, as they would be made."""

    model: str
    device: str
    area_km2: float
    rows: int
    cols: int
    """Of the result, whose pixels are patches."""
    patch_m: float
    tiles: int
    """In which there may be something to map."""
    windows: int
    """That an image and the area reach into: those that `map` and `embed` count as they go."""
    imagery: tuple[Imagery, ...]
    volume: Volume
    peak_memory_gb: float
    """An estimate: what this process takes with the model loaded and the tiles in work, or what earlier runs took."""
    speed: Speed
    seconds: Figure
    impact: Impact
    cost: Figure | None
    currency: str | None

    @property
    def pixels(self) -> int:
        return self.rows * self.cols

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "impact"}
        for name in ("volume", "speed", "seconds", "cost"):
            told[name] = None if told[name] is None else asdict(told[name])
        told["imagery"] = [asdict(one) for one in self.imagery]
        return told | {"pixels": self.pixels, "impact": self.impact.as_dict(area_km2=self.area_km2)}


def plan_map(
    scene: Scene | str | Path | Wanted,
    *,
    model: Encoder | str | Path | None = None,
    probe: Probe | FineTuned | str | Path | None = None,
    device: str | torch.device | None = None,
    box: GeoBox | None = None,
    crs: str | None = None,
    aoi: str | Path | Area | None = None,
    patch_m: float | None = None,
    modalities: Sequence[str] | None = None,
    window_px: int | None = None,
    overlap_px: int | None = None,
    tile_px: int | None = None,
    batch_windows: int = 8,
    workers: int = 1,
    dtype: Dtype = "float32",
    probabilities: bool = False,
    country: str | None = None,
    prices: Prices | None = None,
    measure: bool = False,
    note: Note | None = None,
) -> MapPlan:
    """Say what `map` with a probe, or `embed` without one, would take with the same arguments.

    Windows, pixels and bytes are exact; what lies outside of `aoi` is not counted. Imagery that is still to be fetched
    is planned for the area that it was searched for, unless `aoi` or `box` says otherwise. Time and energy come from
    earlier runs like this one in the ledger, or, with `measure` and where there are none, from embedding a few windows
    now; for imagery that is still to be fetched, clear observations are what providers state, and made-up windows are
    tried.
    """
    grid, area = local_grid(country), read_area(aoi) if aoi is not None else None
    wanted: Wanted | None = None
    if isinstance(scene, Wanted):
        wanted, scene = scene, _scene_of(scene)
        area = wanted.area.geometry if area is None and box is None else area
    if probe is None:
        if model is None:
            raise InputError("which model? name one, or give a probe that names its own")
        encoder = weights.load_model(model, device=device or "cpu") if isinstance(model, str | Path) else model
        scene = scene if isinstance(scene, Scene) else open_scene(scene)
        work = Encoding.plan(
            scene,
            encoder,
            box=box,
            crs=crs,
            area=area,
            patch_m=patch_m if patch_m is not None else 40,
            modalities=modalities,
            window_px=window_px if window_px is not None else 64,
            overlap_px=overlap_px if overlap_px is not None else 16,
            tile_px=tile_px,
            batch_windows=batch_windows,
            workers=workers,
        )
        per_pixel = work.dim * np.dtype(dtype).itemsize
    else:
        probe = as_probe(probe) if isinstance(probe, str | Path) else probe
        work = encoding_for(
            probe,
            scene,
            model=model,
            box=box,
            crs=crs,
            area=area,
            patch_m=patch_m,
            modalities=modalities,
            window_px=window_px,
            overlap_px=overlap_px,
            tile_px=tile_px,
            batch_windows=batch_windows,
            workers=workers,
            device=device,
        )
        check_fit(probe, work)
        per_pixel = np.dtype(map_nodata(probe)[1]).itemsize + 4 * len(probe.classes) * probabilities
    imagery = tuple(_imagery(work, name, wanted) for name in work.modalities)
    speed = None if measure else known_speed(work, read_ledger(note=note))
    speed = speed or (measure_speed if wanted is None else try_pixels)(work, country=country, note=note)
    rows, cols = work.grid.shape
    load = _load_of(work)
    windows = load.windows
    volume = _volume(work, wanted, values=load.values, written=rows * cols * per_pixel)
    seconds = speed.seconds * windows
    stands_for = impact(
        speed.kwh * windows,
        method=speed.method,
        machine_hours=speed.core_seconds * windows / (os.cpu_count() or 1) / 3600,
        gpu_hours=seconds.value / 3600 if work.device.type == "cuda" else 0.0,
        site=local_site(grid),
    )
    return MapPlan(
        model=str(model_of(work)),
        device=device_of(work),
        area_km2=work.area_km2,
        rows=rows,
        cols=cols,
        patch_m=work.patch_m,
        tiles=load.tiles,
        windows=windows,
        imagery=imagery,
        volume=volume,
        peak_memory_gb=max(_peak_memory_gb(work, load), speed.peak_memory_gb or 0.0),
        speed=speed,
        seconds=seconds,
        impact=stands_for,
        cost=None if prices is None else cost(prices, stands_for, seconds=seconds, volume=volume),
        currency=None if prices is None else prices.currency,
    )


def _scene_of(found: Wanted) -> Scene:
    """Describe the scene that would be fetched: its dates and grids, without files."""
    return Scene(
        items=tuple(
            SceneItem(
                id=image.id,
                modality=image.modality,
                date=image.date,
                assets=(),
                grid=image.area.grid(image.modality),
            )
            for image in found.images
        )
    )


def _imagery(work: Encoding, name: str, wanted: Wanted | None) -> Imagery:
    items = sum(item.modality == name for item in work.scene.items)
    clear = None
    if wanted is not None:
        images = [image for image in wanted.images if image.modality == name]
        items = sum(len(image.candidates) for image in images)
        clear = Clear(mean=stated_clear(images))
    elif MODALITIES[name].kind == "series":
        clear = clear_observations(work.scene, name, work.box)
    return Imagery(
        modality=name,
        items=items,
        dates=tuple(date.isoformat() for date in work.scene.dates(name)),
        clear=clear if MODALITIES[name].kind == "series" else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What of the lattice there is to do."""

    tiles: int
    windows: int
    values: int
    """That are read for all tiles."""
    largest: int
    """That are read for one."""


def _load_of(work: Encoding) -> _Load:
    """Go through the tiles as a run would, without reading."""
    tiles = windows = values = largest = 0
    for tile in work.tiles():
        wanted = work.coverage.windows(tile)
        tiles += bool(wanted) or work.coverage.reaches(tile.core)
        if wanted:
            windows += len(wanted)
            read = _num_values(work, wanted)
            values, largest = values + read, max(largest, read)
    return _Load(tiles=tiles, windows=windows, values=values, largest=largest)


def _volume(work: Encoding, wanted: Wanted | None, *, values: int, written: int) -> Volume:
    if wanted is not None:
        fetched = sum(wanted.bytes_of(image) for image in wanted.images if image.modality in work.modalities)
        return Volume(files=None, decoded=4 * values, transferred=fetched, written=written)
    used = [item for item in work.scene.items if item.modality in work.modalities]
    hrefs = {asset.href for item in used for asset in item.assets}
    hrefs |= {item.mask[0] for item in used if item.mask and work.scene.apply_masks}
    local = [Path(href) for href in hrefs if "://" not in href and Path(href).is_file()]
    return Volume(
        files=sum(path.stat().st_size for path in local) if len(local) == len(hrefs) else None,
        decoded=4 * values,
        transferred=2 * values,
        written=written,
    )


def _num_values(work: Encoding, windows: Sequence[Window]) -> int:
    """Count the values that are read for windows of a tile: of all that they cover together."""
    first, last = min(w.row for w in windows), max(w.row + w.height for w in windows)
    left, right = min(w.col for w in windows), max(w.col + w.width for w in windows)
    rows, cols = (slice(n * work.patch_px, m * work.patch_px) for n, m in ((first, last), (left, right)))
    box, total = work.box[rows, cols], 0
    for spec in (MODALITIES[name] for name in work.modalities):
        total += math.prod(modality_grid(spec, box).shape) * len(work.scene.dates(spec.name)) * len(spec.bands)
    return total


def _peak_memory_gb(work: Encoding, load: _Load) -> float:
    """Add the largest tiles in work to what this process takes now; the pixels of a window through the model count.

    Pixels are held for the tile in work, those read ahead and one being put together; features for those in work,
    blended and being written.
    """
    cells = work.lattice.rows.tile * work.lattice.cols.tile
    pixels = (work.workers + 2) * load.largest * (4 + 1 / 4)
    return peak_memory_gb() + (pixels + 3 * 4 * cells * work.dim) / 1e9


def read_prices(path: Path) -> Prices:
    """Read a price list: a JSON object with the keys of `Prices`."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the price list {path}: {error.strerror}") from error
    except ValueError:
        told = None
    known = {f.name for f in fields(Prices)}
    if not isinstance(told, dict) or not isinstance(told.get("currency"), str):
        raise InputError(f'{path} is no price list; wanted JSON such as {{"currency": "EUR", "per_kwh": 0.25}}')
    wrong = [
        key
        for key, value in told.items()
        if key not in known
        or (key != "currency" and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0))
    ]
    if wrong:
        raise InputError(
            f"{path} has {wrong[0]}: {told[wrong[0]]!r}; wanted amounts of 0 or more for any of "
            f"{', '.join(sorted(known - {'currency'}))}"
        )
    return Prices(**told)


def cost(prices: Prices, stands_for: Impact, *, seconds: Figure, volume: Volume) -> Figure:
    """Add up electricity of the data centre, hours of the machine, imagery that is read and results that are kept."""
    read = volume.transferred if volume.files is None else volume.files
    moved = prices.per_gb_egress * read + prices.per_gb_month * prices.months * volume.written
    return (
        stands_for.kwh * stands_for.site.pue * prices.per_kwh
        + seconds * (prices.per_machine_hour / 3600)
        + exactly(moved / 1e9)
    )
