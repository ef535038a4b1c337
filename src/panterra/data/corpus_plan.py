"""Which windows a corpus is made of."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import shapely
from odc.geo.geobox import GeoBox

from panterra.data.composites import DAYS_BEFORE, PERIOD_DAYS, PERIODS
from panterra.data.openstreetmap import cells_by_category, iter_features
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
from panterra.imagery.grids import lonlat
from panterra.imagery.stac import SCENE_FILE, Scene, open_scene
from panterra.modalities import MODALITIES

CELL_PX = 256
OSM = "openstreetmap_raster"
MADE_ON_READING = ("ndvi", "worldcover_onehot")
SAME_TIME_DAYS = 180
"""Windows of the same ground whose centres are closer share more than half of their dates."""
SAME_GROUND = 0.5
"""Share of a cell from which another one, of the neighbouring zone, shows the same ground."""


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


def plan_corpus(job: Job) -> Plan:
    """Choose the windows of a job and deal them into splits, without reading pixels."""
    return plan_windows(job, open_imagery(job).scene)


@dataclass(frozen=True, slots=True, kw_only=True)
class Imagery:
    """What the scenes of a job hold together."""

    scene: Scene
    cloud_cover: Mapping[str, float]
    """Percentage by item, where the catalogue states it."""


def open_imagery(job: Job) -> Imagery:
    """Open the scenes of a job as one."""
    if not job.scenes:
        raise InputError("no scene came; name the folder or address of at least one")
    scenes = [open_scene(address, apply_masks=job.rules.mask_clouds) for address in job.scenes]
    merged = replace(scenes[0], items=tuple(item for scene in scenes for item in scene.items))
    return Imagery(scene=merged, cloud_cover=dict(c for address in job.scenes for c in _cloud_cover(address)))


def _cloud_cover(address: str) -> Iterator[tuple[str, float]]:
    is_file = Path(address).is_file() or address.split("?")[0].endswith("json")
    content = pystac.StacIO.default().read_json(address if is_file else f"{address.rstrip('/')}/{SCENE_FILE}")
    for feature in content.get("features", [content]):
        stated = feature.get("properties", {}).get("eo:cloud_cover")
        if stated is not None:
            yield feature["id"], float(stated)


def plan_windows(job: Job, scene: Scene) -> Plan:
    """Choose the windows of a job in the scene that its own are together."""
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
    return shapely.make_valid(shapely.Polygon(np.column_stack(lonlat(grid.crs, x.tolist(), y.tolist()))))


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


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Make plain values of a plan."""
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


def plan_from_json(content: Mapping[str, Any]) -> Plan:
    """Take a plan from what `plan_to_json` made of it."""
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
