"""From scenes to a pretraining corpus."""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pystac
import shapely
from jaxtyping import Float, Int
from odc.geo.geobox import GeoBox
from rasterio.warp import transform

from panterra.data.composites import (
    DAYS_BEFORE,
    PERIOD_DAYS,
    PERIODS,
    Composite,
    as_stored,
    compose,
    read_item_of,
    timestamps_of,
)
from panterra.data.olmoearth_h5 import Sample, open_corpus, write_corpus
from panterra.data.openstreetmap import (
    RASTER_M,
    Features,
    cells_by_category,
    iter_features,
    rasterise,
    read_features,
    to_common_grid,
)
from panterra.data.windows import (
    PARENT_CELLS,
    Cell,
    Window,
    cells_at,
    cells_touched,
    draw_cells,
    draw_centre,
    outlines,
    overlaps,
    parse_cell,
    read_places,
    split_cells,
)
from panterra.errors import InputError
from panterra.imagery.raster import crs_for_rasterio
from panterra.imagery.stac import SCENE_FILE, Scene, open_scene
from panterra.modalities import MODALITIES

CELL_PX = 256
CHUNK_PX = 32
"""Side of the squares that corpora are stored in, of which a crop reads those it needs."""
OSM = "openstreetmap_raster"
MADE_ON_READING = ("ndvi", "worldcover_onehot")
SAME_TIME_DAYS = 180
"""Windows of the same ground whose centres are closer share more than half of their dates."""
SAME_GROUND = 0.5
"""Share of a cell from which another one, of the neighbouring zone, shows the same ground."""
CANOPY_SHARE = 0.2
"""Least share of pixels with trees in a canopy height map that is kept (OlmoEarth)."""
THUMBNAIL = 16
NEAR_BITS = 16
"""How many of the 480 signs of a thumbnail's differences may differ in a near-identical window."""
NEAR_DISTANCE = 0.1
"""How far apart such thumbnails are at most, on average, in standard deviations of the first."""

Advance = Callable[[int, int], None]
"""Called with what is done and the total."""


# What is to be built


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which windows: those of `places`, else a balance of the categories of `osm`, else all that the scenes cover."""

    places: str | tuple[tuple[float, float], ...] | None = None
    """A file that `read_places` reads, or pairs of longitude and latitude."""
    osm: str | None = None
    """An extract that `iter_features` reads; also what `openstreetmap_raster` is made of."""
    most_per_category: int = 10_000
    first: dt.date | None = None
    """The earliest centre; by default the earliest whose twelve periods the imagery fills, or the middle of it."""
    last: dt.date | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What makes a sample, as published but for `keep_all`."""

    tile_px: int = 128
    """Side of a sample; a window of 256 pixels is cut into as many."""
    min_dates: int = 12
    """Of the series that has most."""
    min_valid: float = 1.0
    """Share of a mosaic that must be data for its date to count; gaps hold 0. Decibels never have gaps."""
    required: tuple[str, ...] = ()
    """Modalities that a sample must have."""
    near_days: int | None = None
    """Within how many days of its centre a window needs a Sentinel-2 image (published: 7); None: none is needed."""
    mask_clouds: bool = False
    """Whether pixels under clouds, where an item has a mask, are left to other items. Published: they are taken."""
    keep_all: bool = True
    """Whether a pixel of OpenStreetMap's raster shows all that is in its 10 m; published: its first 2.5 m alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """How windows are dealt; a block of ground is never in two splits."""

    shares: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})
    block_cells: int = PARENT_CELLS
    """Side of a block in cells of 2,560 m."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a corpus depends on."""

    scenes: tuple[str, ...]
    """What `open_scene` opens, by path or address."""
    modalities: tuple[str, ...] = ()
    """Empty: those of the scenes, and OpenStreetMap's raster where there is an extract."""
    choice: Choice = field(default_factory=Choice)
    rules: Rules = field(default_factory=Rules)
    splits: Splits = field(default_factory=Splits)
    seed: int = 0
    compression: str | None = "zstd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Something that is not in the corpus."""

    window: str
    tile: int | None = None
    """Number of the part of the window, row by row; None: all of it."""
    modality: str | None = None
    """None: everything."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The windows of a job."""

    modalities: tuple[str, ...]
    windows: tuple[Window, ...]
    splits: Mapping[Cell, str]
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished corpus: one folder per split, `windows.csv` (what each sample is), `dropped.csv` and `report.json`."""

    root: Path
    corpora: Mapping[str, Path]
    report: Mapping[str, Any]


# Planning


def plan_corpus(job: Job) -> Plan:
    """Choose the windows of a job and deal them into splits, without reading pixels."""
    return _plan(job, _open(job).scene)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Imagery:
    scene: Scene
    cloud_cover: Mapping[str, float]
    """Percentage by item, where the catalogue states it."""


def _open(job: Job) -> _Imagery:
    if not job.scenes:
        raise InputError("no scene came; name the folder or address of at least one")
    scenes = [open_scene(address, apply_masks=job.rules.mask_clouds) for address in job.scenes]
    merged = replace(scenes[0], items=tuple(item for scene in scenes for item in scene.items))
    return _Imagery(scene=merged, cloud_cover=dict(c for address in job.scenes for c in _cloud_cover(address)))


def _cloud_cover(address: str) -> Iterator[tuple[str, float]]:
    is_file = Path(address).is_file() or address.split("?")[0].endswith("json")
    content = pystac.StacIO.default().read_json(address if is_file else f"{address.rstrip('/')}/{SCENE_FILE}")
    for feature in content.get("features", [content]):
        stated = feature.get("properties", {}).get("eo:cloud_cover")
        if stated is not None:
            yield feature["id"], float(stated)


def _plan(job: Job, scene: Scene) -> Plan:
    modalities = _modalities(job, scene)
    _check_rules(job, modalities)
    choice = job.choice
    centres: dict[Cell, set[dt.date | None]] = {}
    drawn: Mapping[Cell, tuple[str, ...]] = {}
    ground = _ground(scene)
    if choice.places is not None:
        listed = (
            read_places(choice.places)
            if isinstance(choice.places, str)
            else [(cell, None) for cell in cells_at(np.array(choice.places, np.float64))]
        )
        for cell, day in listed:
            centres.setdefault(cell, set()).add(day)
    elif choice.osm is not None:
        found = cells_by_category(iter_features(choice.osm))
        there = set(_covered(sorted(set().union(*found.values())), ground))
        drawn = draw_cells(
            {name: cells & there for name, cells in found.items()}, choice.most_per_category, seed=job.seed
        )
    else:
        drawn = dict.fromkeys(_covered(cells_touched(shapely.get_parts(ground))[1], ground), ())
    centres |= {cell: {None} for cell in drawn}
    if not centres:
        raise InputError(
            f"the scenes cover no whole cell of 2,560 m{' with a feature of ' + choice.osm if choice.osm else ''}; "
            "give larger scenes or, with --places, the places themselves"
        )
    covered = set(_covered(sorted(centres), ground))
    first, last = _centre_range(choice, scene, modalities)
    windows, dropped = [], []
    for cell in sorted(centres):
        days = {day or draw_centre(cell, first, last, seed=job.seed) for day in centres[cell]}
        for day in sorted(days):
            window = Window(cell=cell, centre=day, categories=drawn.get(cell, ()))
            if cell in covered:
                windows.append(window)
            else:
                dropped.append(Dropped(window=window.name, why="the scenes do not cover it"))
    windows, same = _one_of_each(windows)
    if not windows:
        raise InputError(f"the scenes cover none of the {len(centres)} cells of the places that were given")
    splits = split_cells(
        [w.cell for w in windows], job.splits.shares, seed=job.seed, parent_cells=job.splits.block_cells
    )
    return Plan(modalities=modalities, windows=tuple(windows), splits=splits, dropped=(*dropped, *same))


def _modalities(job: Job, scene: Scene) -> tuple[str, ...]:
    here = {name for name in scene.modalities if _can_be_stored(name)} | ({OSM} if job.choice.osm else set())
    wanted = job.modalities or tuple(name for name in MODALITIES if name in here)
    absent = [name for name in wanted if name not in here]
    if absent:
        raise InputError(
            f"{absent[0]} cannot be built: the scenes hold {', '.join(sorted(here)) or 'nothing that a corpus keeps'}"
            + (f"; {OSM} needs an extract, --osm" if absent[0] == OSM else "")
        )
    if not any(MODALITIES[name].kind == "series" for name in wanted):
        raise InputError(f"{', '.join(wanted)} are maps; a corpus needs at least one series of images")
    return wanted


def _can_be_stored(name: str) -> bool:
    """Tell whether a modality varies in space and its pixels divide the common grid."""
    spec = MODALITIES[name]
    finer = 10 / spec.gsd if spec.gsd else 0
    return spec.kind in ("series", "still") and name not in MADE_ON_READING and (finer <= 1 or finer == round(finer))


def _check_rules(job: Job, modalities: Sequence[str]) -> None:
    rules = job.rules
    if rules.tile_px < 1 or CELL_PX % rules.tile_px:
        raise InputError(f"tiles of {rules.tile_px} px do not divide a window of {CELL_PX} px; take 256, 128, 64 or 32")
    if not 0 < rules.min_valid <= 1:
        raise InputError(f"min_valid is {rules.min_valid}; wanted a share above 0 and at most 1")
    if not 1 <= rules.min_dates <= PERIODS:
        raise InputError(f"min_dates is {rules.min_dates}; wanted 1 to {PERIODS}")
    absent = [name for name in rules.required if name not in modalities]
    if absent:
        raise InputError(f"{absent[0]} is required, but only {', '.join(modalities)} are built")
    if rules.near_days is not None and "sentinel2_l2a" not in modalities:
        raise InputError("near_days asks for Sentinel-2 images, which are not built; leave it out")
    odd = [name for name in job.splits.shares if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or name == "parts"]
    if odd:
        raise InputError(f"{odd[0]!r} cannot name a split; take letters and digits, such as train")


def _ground(scene: Scene) -> shapely.Geometry:
    """Return what the series of a scene cover, in degrees."""
    series = [item for item in scene.items if MODALITIES[item.modality].kind == "series"]
    if not series:
        raise InputError("the scenes hold maps alone; a corpus needs at least one series of images")
    grids = {item.grid or replace(scene, items=(item,)).geobox(modality=item.modality) for item in series}
    return shapely.union_all([_degrees(grid) for grid in grids])


def _degrees(grid: GeoBox) -> shapely.Geometry:
    edge = np.linspace(0, 1, 17)
    none, full = np.zeros(17), np.ones(17)
    u = np.concatenate([edge, full, edge[::-1], none]) * grid.shape[1]
    v = np.concatenate([none, edge, full, edge[::-1]]) * grid.shape[0]
    to = grid.affine
    x, y = to.a * u + to.b * v + to.c, to.d * u + to.e * v + to.f
    return shapely.make_valid(shapely.Polygon(np.column_stack(_lonlat(grid, x, y))))


def _lonlat(grid: GeoBox, x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    lon, lat = transform(crs_for_rasterio(grid.crs), "EPSG:4326", x, y)[:2]
    return lon, lat


def _covered(cells: Sequence[Cell], ground: shapely.Geometry) -> list[Cell]:
    """Return the cells that lie on the ground, but for a pixel or two."""
    if not cells:
        return []
    wider = shapely.buffer(ground, 2e-4)
    shapely.prepare(wider)
    inside = shapely.covers(wider, outlines(cells))
    return sorted({cell for cell, is_inside in zip(cells, inside, strict=True) if is_inside})


def _centre_range(choice: Choice, scene: Scene, modalities: Sequence[str]) -> tuple[dt.date, dt.date]:
    days = [
        day for m in modalities if m in scene.modalities and MODALITIES[m].kind == "series" for day in scene.dates(m)
    ]
    start, end = min(days), max(days)
    first = start + dt.timedelta(days=DAYS_BEFORE)
    last = end - dt.timedelta(days=PERIODS * PERIOD_DAYS - DAYS_BEFORE - 1)
    if last < first:
        # Less than a year: its middle becomes the middle of the periods.
        middle = start + dt.timedelta(days=((end - start).days + 1) // 2)
        first = last = middle + dt.timedelta(days=DAYS_BEFORE - PERIODS * PERIOD_DAYS // 2)
    first = choice.first or min(first, choice.last or first)
    return first, choice.last or max(first, last)


def _one_of_each(windows: Sequence[Window]) -> tuple[list[Window], list[Dropped]]:
    """Keep one of the windows that show the same ground at the same time."""
    by_cell: dict[Cell, list[Window]] = {}
    for window in windows:
        by_cell.setdefault(window.cell, []).append(window)
    cells = list(by_cell)
    same_ground = {cell: [cell] for cell in cells}
    for one, other, share in overlaps(cells):
        if share >= SAME_GROUND:
            same_ground[cells[one]].append(cells[other])
            same_ground[cells[other]].append(cells[one])
    kept: dict[Cell, list[Window]] = {cell: [] for cell in cells}
    dropped = []
    for window in sorted(windows):
        rivals = (w for cell in same_ground[window.cell] for w in kept[cell])
        rival = next((w for w in rivals if abs((w.centre - window.centre).days) < SAME_TIME_DAYS), None)
        if rival is None:
            kept[window.cell].append(window)
        else:
            dropped.append(Dropped(window=window.name, why=f"same place and time as {rival.name}"))
    return [w for cell in cells for w in kept[cell]], dropped


# Building


def build_corpus(root: str | Path, job: Job, *, workers: int = 4, progress: Advance | None = None) -> Built:
    """Read, check and write the windows of a job into `root`; killed at any moment, the same call goes on.

    `root/plan.json` holds the job and its windows, `root/parts` the windows that are done, until all are. The bytes of
    the corpus do not depend on interruptions or on the number of workers, which read windows side by side.
    """
    root = Path(root)
    imagery = _open(job)
    plan = _begin(root, job, imagery)
    if (root / "report.json").is_file():
        return _finished(root)
    osm = None
    if OSM in plan.modalities and job.choice.osm is not None:
        osm = read_features(job.choice.osm, cells=sorted({w.cell for w in plan.windows}))
    todo = [window for window in plan.windows if not _note(root, window).is_file()]
    done = len(plan.windows) - len(todo)
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as threads:
        jobs = [threads.submit(_make_part, root, window, job, plan.modalities, imagery, osm) for window in todo]
        try:
            for finished in as_completed(jobs):
                finished.result()
                done += 1
                if progress is not None:
                    progress(done, len(plan.windows))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    _conclude(root, job, plan)
    return _finished(root)


def _begin(root: Path, job: Job, imagery: _Imagery) -> Plan:
    """Return the plan in a folder, or make it there."""
    path = root / "plan.json"
    wanted = json.loads(json.dumps(asdict(job) | {"inputs": _inputs(job, imagery.scene)}, default=str))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["job"] != wanted:
            keys = sorted(k for k in {*before["job"], *wanted} if before["job"].get(k) != wanted.get(k))
            raise InputError(
                f"{root} holds a corpus of a job with other {', '.join(keys)}; repeat that job to go on with it, "
                "or choose another folder"
            )
        return _plan_from_json(before)
    if root.is_dir() and {entry.name for entry in root.iterdir()} - {_partial(path).name}:
        raise InputError(f"{root} holds other things; choose another folder")
    plan = _plan(job, imagery.scene)
    root.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps({"job": wanted, **_plan_to_json(plan)}, indent=1))
    return plan


def _inputs(job: Job, scene: Scene) -> dict[str, str]:
    """Sum up what is read, so that a build never goes on with other imagery."""
    items = "\n".join(f"{item.modality} {item.id} {item.date}" for item in scene.items)
    files = {Path(asset.href) for item in scene.items for asset in item.assets}
    paths = [*sorted(files), *(Path(p) for p in (job.choice.places, job.choice.osm) if isinstance(p, str))]
    sizes = "\n".join(f"{path} {path.stat().st_size}" for path in paths if path.is_file())
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("items", items), ("files", sizes))}


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    return {
        "modalities": plan.modalities,
        "windows": [
            {
                "cell": w.cell.name,
                "centre": str(w.centre),
                "split": plan.splits[w.cell],
                "categories": list(w.categories),
            }
            for w in plan.windows
        ],
        "dropped": [asdict(d) for d in plan.dropped],
    }


def _plan_from_json(content: Mapping[str, Any]) -> Plan:
    rows = content["windows"]
    windows = tuple(
        Window(
            cell=parse_cell(row["cell"]),
            centre=dt.date.fromisoformat(row["centre"]),
            categories=tuple(row["categories"]),
        )
        for row in rows
    )
    return Plan(
        modalities=tuple(content["modalities"]),
        windows=windows,
        splits={window.cell: row["split"] for window, row in zip(windows, rows, strict=True)},
        dropped=tuple(Dropped(**d) for d in content["dropped"]),
    )


def _note(root: Path, window: Window) -> Path:
    """Say which file tells that a window is done, and how."""
    return root / "parts" / f"{window.name}.json"


def _make_part(
    root: Path, window: Window, job: Job, modalities: Sequence[str], imagery: _Imagery, osm: Features | None
) -> None:
    """Make the samples of a window; its note appears last."""
    note = _note(root, window)
    folder = note.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    layers, dropped = _read_window(window, job, modalities, imagery, osm)
    samples: dict[int, Sample] = {}
    if layers:
        samples, more = _cut(window, layers, job)
        dropped += more
    if samples:
        write_corpus(folder, samples.values(), tiles_per_sample=len(samples), compression=job.compression)
    note.parent.mkdir(parents=True, exist_ok=True)
    content = {"tiles": list(samples), "dropped": [asdict(d) for d in dropped]}
    if samples:
        content |= {"exact": _digest(samples.values()), "thumbnail": _thumbnail(layers)}
    _write(note, json.dumps(content))


def _read_window(
    window: Window, job: Job, modalities: Sequence[str], imagery: _Imagery, osm: Features | None
) -> tuple[dict[str, Composite], list[Dropped]]:
    box, near_days = window.cell.box(), job.rules.near_days
    if near_days is not None:
        near = (
            item
            for item in imagery.scene.items
            if item.modality == "sentinel2_l2a" and abs((item.date - window.centre).days) <= near_days
        )
        if not any(read_item_of(imagery.scene, item, box).valid.any() for item in near):
            why = f"no Sentinel-2 image within {near_days} days of its centre"
            return {}, [Dropped(window=window.name, why=why)]
    layers = {}
    for name in modalities:
        if name == OSM and osm is not None:
            raster = to_common_grid(rasterise(osm, window.cell.box(RASTER_M)), keep_all=job.rules.keep_all)
            layers[name] = Composite(
                pixels=raster[None].astype(np.float32), valid=np.ones((1, CELL_PX, CELL_PX), np.bool_)
            )
        else:
            layers[name] = compose(imagery.scene, name, box, window.centre, cloud_cover=imagery.cloud_cover)
    return layers, []


def _cut(window: Window, layers: Mapping[str, Composite], job: Job) -> tuple[dict[int, Sample], list[Dropped]]:
    """Cut a window into samples, by number, and say what does not get into them."""
    rules = job.rules
    across = CELL_PX // rules.tile_px
    samples: dict[int, Sample] = {}
    dropped: list[Dropped] = []
    for tile in range(across**2):
        row, col = divmod(tile, across)
        pixels: dict[str, np.ndarray] = {}
        present: dict[str, np.ndarray] = {}
        for name, layer in layers.items():
            part = _part_of(layer, row, col, across)
            if MODALITIES[name].kind == "series":
                present[name] = _dates_with_data(name, part, rules.min_valid)
                why = None if present[name].any() else "no date has enough data"
                part = Composite(pixels=part.pixels[present[name]], valid=part.valid[present[name]])
            else:
                why = _what_a_map_lacks(name, part)
            if why is None:
                pixels[name] = as_stored(np.moveaxis(part.pixels, (0, 1), (2, 3)), name)
            else:
                present.pop(name, None)
                dropped.append(Dropped(window=window.name, tile=tile, modality=name, why=why))
        longest = max((int(which.sum()) for which in present.values()), default=0)
        absent = [name for name in rules.required if name not in pixels]
        if longest < rules.min_dates or absent:
            few = f"fewer than {rules.min_dates} dates" if longest else "no series has data"
            why = f"{absent[0]} is required" if absent else few
            dropped.append(Dropped(window=window.name, tile=tile, why=why))
        else:
            samples[tile] = Sample(
                latlon=_centre(window.cell, row, col, across),
                timestamps=timestamps_of(window.centre),
                pixels=pixels,
                present=present,
            )
    return samples, dropped


def _part_of(layer: Composite, row: int, col: int, across: int) -> Composite:
    side = layer.valid.shape[-1] // across
    rows, cols = slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)
    return Composite(pixels=layer.pixels[..., rows, cols], valid=layer.valid[..., rows, cols])


def _dates_with_data(name: str, part: Composite, min_valid: float) -> np.ndarray:
    share = part.valid.mean((1, 2))
    # 0 stands for a gap in reflectance and in digital numbers; among decibels it is a bright pixel.
    least = min_valid if MODALITIES[name].unit in ("reflectance_1e4", "dn") else 1.0
    enough: np.ndarray = (share > 0) & (share >= least)
    return enough


def _what_a_map_lacks(name: str, part: Composite) -> str | None:
    """Say why a map does not come into a sample (OlmoEarth's rules)."""
    if name == OSM:
        return None if part.pixels.any() else "no feature"
    if name == "worldcereal":
        return None if part.valid.any() else "no data"  # products that are missing count as 0
    if not part.valid.all():
        return "not all of it is data"
    if name == "wri_canopy_height_map" and (part.pixels > 0).mean() < CANOPY_SHARE:
        return f"trees on less than {CANOPY_SHARE:.0%} of it"
    return None


def _centre(cell: Cell, row: int, col: int, across: int) -> tuple[float, float]:
    box = cell.box()
    x, y = box.affine @ ((col + 0.5) * CELL_PX / across, (row + 0.5) * CELL_PX / across)
    (lon,), (lat,) = _lonlat(box, np.array([x]), np.array([y]))
    return lat, lon


# Duplicates


def _digest(samples: Iterable[Sample]) -> str:
    """Sum up the images of samples, wherever they lie."""
    total = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample.present):
            total.update(name.encode() + np.packbits(sample.present[name]).tobytes())
            total.update(np.ascontiguousarray(sample.pixels[name]).tobytes())
    return total.hexdigest()


def _thumbnail(layers: Mapping[str, Composite]) -> list[float]:
    """Average the first series over its dates and bands, down to 16 x 16 blocks."""
    layer = next(layer for name, layer in layers.items() if MODALITIES[name].kind == "series" and layer.valid.any())
    weight = layer.valid.sum(0)
    mean = layer.pixels.mean(1).sum(0) / np.maximum(weight, 1)
    side = mean.shape[0] // THUMBNAIL
    blocks = mean[: side * THUMBNAIL, : side * THUMBNAIL].reshape(THUMBNAIL, side, THUMBNAIL, side).mean((1, 3))
    return [float(value) for value in blocks.astype(np.float32).ravel()]


def find_duplicates(
    windows: Sequence[Window], digests: Sequence[str], thumbnails: Float[np.ndarray, "n 256"]
) -> dict[int, tuple[int, str]]:
    """Find windows that look like an earlier one: number -> number of that one and how alike they are.

    Pixels that are equal are duplicates anywhere. Others are where the thumbnails rise and fall alike, but for
    `NEAR_BITS` of their differences, and lie close; the same cell at another time is not.
    """
    signs = _signs(thumbnails)
    # Two rows that differ in at most n bits agree on at least one of n + 1 parts.
    parts = [np.packbits(part, axis=1) for part in np.array_split(signs, NEAR_BITS + 1, axis=1)]
    spread = np.maximum(thumbnails.std(1), 1e-12)
    first: dict[str, int] = {}
    buckets: dict[tuple[int, bytes], list[int]] = {}
    found: dict[int, tuple[int, str]] = {}
    for number, digest in enumerate(digests):
        if digest in first:
            found[number] = first[digest], "the same pixels as"
            continue
        first[digest] = number
        keys = [(place, part[number].tobytes()) for place, part in enumerate(parts)]
        rivals = sorted({rival for key in keys for rival in buckets.get(key, ())})
        for rival in rivals:
            alike = (signs[rival] != signs[number]).sum() <= NEAR_BITS
            distance = np.abs(thumbnails[rival] - thumbnails[number]).mean() / spread[rival]
            if alike and distance <= NEAR_DISTANCE and windows[rival].cell != windows[number].cell:
                found[number] = rival, "nearly the same pixels as"
                break
        else:
            for key in keys:
                buckets.setdefault(key, []).append(number)
    return found


def _signs(thumbnails: Float[np.ndarray, "n 256"]) -> Int[np.ndarray, "n 480"]:
    grid = thumbnails.reshape(-1, THUMBNAIL, THUMBNAIL)
    steps = [np.diff(grid, axis=axis).reshape(len(grid), -1) > 0 for axis in (1, 2)]
    return np.concatenate(steps, axis=1).astype(np.int64)


# Writing


def _conclude(root: Path, job: Job, plan: Plan) -> None:
    """Leave out duplicates and write one corpus per split, then the tables and last the report."""
    notes = [json.loads(_note(root, window).read_text(encoding="utf-8")) for window in plan.windows]
    dropped = [*plan.dropped, *(Dropped(**d) for note in notes for d in note["dropped"])]
    filled = [(window, note) for window, note in zip(plan.windows, notes, strict=True) if note["tiles"]]
    if not filled:
        (why, count), *_ = Counter(d.why for d in dropped if d.modality is None).most_common(1)
        raise InputError(
            f"none of the {len(plan.windows)} windows is fit for a corpus, mostly ({count}) because: {why}; "
            "loosen the rules (--min-dates, --min-valid) in another folder, or add imagery"
        )
    thumbnails = np.array([note["thumbnail"] for _, note in filled], np.float32)
    twins = find_duplicates([window for window, _ in filled], [note["exact"] for _, note in filled], thumbnails)
    for number, (other, how) in twins.items():
        dropped.append(Dropped(window=filled[number][0].name, why=f"{how} {filled[other][0].name}"))
    rows: dict[str, list[tuple[Window, int]]] = {name: [] for name in job.splits.shares}
    for number, (window, note) in enumerate(filled):
        if number not in twins:
            rows[plan.splits[window.cell]] += [(window, tile) for tile in note["tiles"]]
    corpora, across = {}, CELL_PX // job.rules.tile_px
    for split, members in rows.items():
        if members:
            # What an interrupted run has left here is not whole, or will come out the same.
            shutil.rmtree(root / split, ignore_errors=True)
            stored = _stored_samples(root, dict.fromkeys(window for window, _ in members), across)
            folder = write_corpus(
                root / split,
                stored,
                tiles_per_sample=across**2,
                compression=job.compression,
                chunk_px=CHUNK_PX,
            )
            corpora[split] = str(folder.relative_to(root))
    _write_table(
        root / "windows.csv",
        ("split", "sample_index", "window", "cell", "centre", "tile", "categories"),
        [
            (split, index, window.name, window.cell.name, window.centre, tile, " ".join(window.categories))
            for split, members in rows.items()
            for index, (window, tile) in enumerate(members)
        ],
    )
    _write_table(
        root / "dropped.csv",
        ("window", "tile", "modality", "why"),
        [(d.window, "" if d.tile is None else d.tile, d.modality or "", d.why) for d in dropped],
    )
    report = {
        "corpora": corpora,
        "modalities": plan.modalities,
        "windows": len(plan.windows) + len(plan.dropped),
        "windows_kept": len(filled) - len(twins),
        "samples": {split: len(members) for split, members in rows.items()},
        "dropped": _tally(dropped),
    }
    _write(root / "report.json", json.dumps(report, indent=1))
    shutil.rmtree(root / "parts")


def _tally(dropped: Iterable[Dropped]) -> dict[str, int]:
    """Count what was dropped by reason, without the names of windows."""
    reasons: Counter[str] = Counter()
    for d in dropped:
        why = re.sub(r" as \d+_-?\d+_-?\d+_[\d-]+$", " as another window", d.why)
        level = d.modality or ("windows" if d.tile is None else "samples")
        reasons[f"{level}: {why}"] += 1
    return dict(sorted(reasons.items()))


def _stored_samples(root: Path, windows: Iterable[Window], across: int) -> Iterator[Sample]:
    """Read the samples of windows back, one at a time."""
    for window in windows:
        note = _note(root, window)
        folder = open_corpus(note.with_suffix("")).folder
        for number, tile in enumerate(json.loads(note.read_text(encoding="utf-8"))["tiles"]):
            row, col = divmod(tile, across)
            with h5py.File(folder / f"sample_{number}.h5", "r") as file:
                yield Sample(
                    latlon=_centre(window.cell, row, col, across),
                    timestamps=file["timestamps"][:],
                    pixels={name: file[name][:] for name in file if name in MODALITIES and name != "latlon"},
                    present={name: which[:] for name, which in file["missing_timesteps_masks"].items()},
                )


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    temporary = _partial(path)
    with temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(head)
        table.writerows(rows)
    temporary.replace(path)


def _write(path: Path, text: str) -> None:
    temporary = _partial(path)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _finished(root: Path) -> Built:
    shutil.rmtree(root / "parts", ignore_errors=True)
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    return Built(root=root, corpora={name: root / folder for name, folder in report["corpora"].items()}, report=report)
