"""What a map will take, said before it is made."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT

from panterra.energy import EnergyReport
from panterra.energy.grid import local_grid
from panterra.energy.impact import Figure, Impact, exactly, impact, impact_of, local_site
from panterra.energy.ledger import Note, read_ledger
from panterra.energy.meter import peak_memory_gb
from panterra.errors import InputError
from panterra.evaluate.probes import Probe
from panterra.finetune.model import FineTuned
from panterra.imagery.items import MASKS, SceneItem
from panterra.imagery.raster import REMOTE, Bools, crs_for_rasterio
from panterra.imagery.stac import Scene, modality_grid, open_scene
from panterra.imagery.wish import Plan as Wanted
from panterra.mapping.areas import Area, read_area
from panterra.mapping.effort import Speed, device_of, joined, known_speed, model_of, spread
from panterra.mapping.embeddings import Dtype
from panterra.mapping.plan_area import scene_of, stated_clear, try_pixels
from panterra.mapping.run import as_probe, check_fit, common_grid, embed, encoding_for, one_grid
from panterra.mapping.sinks import map_nodata
from panterra.mapping.sources import Encoding
from panterra.mapping.tiles import Window
from panterra.modalities import MODALITIES
from panterra.models import weights
from panterra.models.features import Encoder

CLEAR_PX = 256
"""The longer side of the grid on which clear observations are counted."""
READERS = 8
SHARES = (0.5, 0.25, 0.5, 0.75)
"""Where a few windows are tried, by the share of tiles before them."""
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clear:
    """How often the ground was seen without cloud, shadow or gaps."""

    mean: float
    least: float | None = None
    """Nine in ten pixels have as many or more; None where only providers' figures for whole images are known."""
    never: float | None = None
    """The share of pixels that have none."""
    pixel_m: float | None = None
    """Of the grid on which it was counted."""


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
        wanted, scene = scene, scene_of(scene)
        area = wanted.area.geometry if area is None and box is None else area
    if probe is None:
        if model is None:
            raise InputError("which model? name one, or give a probe that names its own")
        encoder = weights.load_model(model) if isinstance(model, str | Path) else model
        scene = scene if isinstance(scene, Scene) else open_scene(scene)
        work = Encoding.plan(
            scene,
            encoder,
            box=one_grid(box, crs) or common_grid(scene, encoder, modalities, crs=crs, area=area),
            area=area,
            patch_m=patch_m or 40,
            modalities=modalities,
            window_px=window_px or 64,
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
            box=one_grid(box, crs),
            crs=crs,
            area=area,
            patch_m=patch_m,
            modalities=modalities,
            window_px=window_px,
            overlap_px=overlap_px,
            tile_px=tile_px,
            batch_windows=batch_windows,
            workers=workers,
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


# What is there --------------------------------------------------------------------------------------------------------


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


def clear_observations(scene: Scene, modality: str, box: GeoBox) -> Clear:
    """Count on how many dates each place was seen, by masks and nodata values, on a grid of `CLEAR_PX` at most.

    Reads one band and the mask of every item, from overviews where the files have them.
    """
    scale = max(1, -(-max(box.shape) // CLEAR_PX))
    coarse = box.zoom_out(scale) if scale > 1 else box
    items = [item for item in scene.items if item.modality == modality]
    with ThreadPoolExecutor(READERS) as pool:
        seen = list(pool.map(lambda item: _seen(scene, item, coarse), items))
    dates = sorted({item.date for item in items})
    counts = np.zeros(coarse.shape, int)
    for date in dates:
        counts += np.any([one for item, one in zip(items, seen, strict=True) if item.date == date], axis=0)
    return Clear(
        mean=float(counts.mean()),
        least=float(np.quantile(counts, 0.1, method="lower")),
        never=float((counts == 0).mean()),
        pixel_m=float(abs(coarse.affine.a)),
    )


def _seen(scene: Scene, item: SceneItem, grid: GeoBox) -> Bools:
    asset = item.assets[0]
    band = asset.bands[0]
    values, inside = _nearest(asset.href, band.index, grid)
    seen: Bools = inside & np.isfinite(values)
    if band.nodata is not None:
        seen &= values != band.nodata
    if item.mask is not None and scene.apply_masks:
        codes, known = _nearest(item.mask[0], 1, grid)
        seen &= MASKS[item.mask[1]](codes.astype(np.float32)) & known
    return seen


def _nearest(href: str, band: int, grid: GeoBox) -> tuple[np.ndarray, Bools]:
    """Read the nearest pixels of a band, and where the file has data; GDAL takes the overview that suffices."""
    try:
        with rasterio.Env(**(REMOTE if "://" in href else {})), rasterio.open(href) as file:
            placed = {"src_crs": file.gcps[1]} if file.crs is None and file.gcps[0] else {}
            masked = file.nodata is not None or ColorInterp.alpha in file.colorinterp
            with WarpedVRT(
                file,
                crs=crs_for_rasterio(grid.crs),
                transform=grid.affine,
                height=grid.shape[0],
                width=grid.shape[1],
                resampling=Resampling.nearest,
                add_alpha=not masked,
                **placed,
            ) as seen:
                return seen.read(band), seen.read_masks(band) > 0
    except RasterioError as error:
        raise InputError(f"cannot read {href}: {str(error).splitlines()[0]}") from error


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


# How fast it goes -----------------------------------------------------------------------------------------------------


def measure_speed(work: Encoding, *, country: str | None = None, note: Note | None = None) -> Speed:
    """Embed a few windows at some places of the area, as a run would, and say what a window took.

    The first place is for warming up; it counts alone where it took longer than `PATIENCE_S`.
    """
    if note:
        note(f"measuring: a few windows go through {work.encoder.name}, at {len(SHARES) - 1} places of the area")
    tried: list[EnergyReport] = []
    with tempfile.TemporaryDirectory(prefix="panterra-plan-") as folder:
        for number, block in enumerate(_places(work)):
            store = embed(
                work.scene,
                work.encoder,
                Path(folder) / f"block{number}.zarr",
                box=work.box[block.scaled(work.patch_px).slices],
                patch_m=work.patch_m,
                modalities=work.modalities,
                window_px=work.about["window_px"],
                overlap_px=work.about["overlap_px"],
                batch_windows=work.batch_windows,
                workers=work.workers,
                country=country,
            )
            height, width = store.box.shape
            if np.isfinite(store.read(Window(row=0, col=0, height=height, width=width))).any():
                told = json.loads(store.passport.read_text(encoding="utf-8"))["properties"]
                tried.append(EnergyReport.of(told["panterra:energy"]))
                if tried[-1].seconds > PATIENCE_S:
                    break
    if not tried:
        raise InputError(
            "nothing can be measured: the area has no data in its middle; embed a part that has some first"
        )
    runs = tried[1:] or tried
    windows = math.prod(_block_windows(work))
    return Speed(
        seconds=spread([run.seconds / windows for run in runs]),
        kwh=joined([impact_of(run).kwh * (1 / windows) for run in runs]),
        method=runs[0].method,
        runs=len(runs),
        source=f"{windows} windows at each of {len(runs)} places, measured now",
        core_seconds=statistics.median(run.core_seconds for run in runs) / windows,
        peak_memory_gb=max(run.peak_memory_gb for run in runs),
    )


def _block_windows(work: Encoding) -> tuple[int, int]:
    """Return how many windows, down and across, are tried at a place: a batch, where the area has as many."""
    down = min(math.isqrt(work.batch_windows), work.lattice.rows.num_windows)
    return down, min(work.batch_windows // down, work.lattice.cols.num_windows)


def _places(work: Encoding) -> list[Window]:
    """Place batches of windows where there may be something to map, in patches."""
    tiles = [(tile.row, tile.col) for tile in work.tiles() if work.cost(tile)]
    if not tiles:
        raise InputError("nothing can be measured, as no image shows the area; wanted an area that meets the scene")
    rows, cols = work.lattice.rows, work.lattice.cols
    height, width = (
        min(axis.window + (number - 1) * axis.stride, axis.size)
        for axis, number in zip((rows, cols), _block_windows(work), strict=True)
    )
    places = []
    for share in SHARES:
        windows = work.coverage.windows(work.lattice.tile(*tiles[int(share * (len(tiles) - 1))]))
        middle = windows[len(windows) // 2]
        row, col = min(middle.row, rows.size - height), min(middle.col, cols.size - width)
        places.append(Window(row=row, col=col, height=height, width=width))
    return places


# What it costs --------------------------------------------------------------------------------------------------------


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
