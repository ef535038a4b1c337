"""From scenes to a pretraining corpus."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from panterra.data.composites import Composite, as_stored, compose, read_item_of, timestamps_of
from panterra.data.corpus_plan import (
    CELL_PX,
    OSM,
    Dropped,
    Imagery,
    Job,
    Plan,
    open_imagery,
    plan_from_json,
    plan_to_json,
    plan_windows,
)
from panterra.data.duplicates import digest, find_duplicates, thumbnail
from panterra.data.olmoearth_h5 import Sample, open_corpus, write_corpus
from panterra.data.openstreetmap import RASTER_M, Features, rasterise, read_features, to_common_grid
from panterra.data.windows import Cell, Window
from panterra.errors import InputError
from panterra.files import claimed, read_json, unfinished, write_whole
from panterra.imagery.grids import lonlat
from panterra.imagery.stac import Scene
from panterra.modalities import MODALITIES

CHUNK_PX = 32
"""Side of the squares that corpora are stored in, of which a crop reads those it needs."""
CANOPY_SHARE = 0.2
"""Least share of pixels with trees in a canopy height map that is kept (OlmoEarth)."""

Advance = Callable[[int, int], None]
"""Called with what is done and the total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished corpus: one folder per split, `windows.csv` (what each sample is), `dropped.csv` and `report.json`."""

    root: Path
    corpora: Mapping[str, Path]
    report: Mapping[str, Any]


def build_corpus(root: str | Path, job: Job, *, workers: int = 4, progress: Advance | None = None) -> Built:
    """Read, check and write the windows of a job into `root`; killed at any moment, the same call goes on.

    `root/plan.json` holds the job and its windows, `root/parts` the windows that are done, until all are. The bytes of
    the corpus do not depend on interruptions or on the number of workers, which read windows side by side.
    """
    root = Path(root)
    imagery = open_imagery(job)
    plan = _begin(root, job, imagery)
    if (root / "report.json").is_file():
        return _finished(root)
    with claimed(root / "parts", f"the corpus in {root}"):
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


def _begin(root: Path, job: Job, imagery: Imagery) -> Plan:
    """Return the plan in a folder, or make it there."""
    path = root / "plan.json"
    wanted = json.loads(json.dumps(asdict(job) | {"inputs": _inputs(job, imagery.scene)}, default=str))
    if path.is_file():
        before = read_json(path, f"remove {root} to start afresh")
        if before["job"] != wanted:
            keys = sorted(k for k in {*before["job"], *wanted} if before["job"].get(k) != wanted.get(k))
            raise InputError(
                f"{root} holds a corpus of a job with other {', '.join(keys)}; repeat that job to go on with it, "
                "or choose another folder"
            )
        return plan_from_json(before)
    leftovers = {*root.glob(f".{path.name}*.tmp")}
    if root.is_dir() and {*root.iterdir()} - leftovers:
        raise InputError(f"{root} holds other things; choose another folder")
    for leftover in leftovers:
        leftover.unlink()
    plan = plan_windows(job, imagery.scene)
    root.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"job": wanted, **plan_to_json(plan)}, indent=1) + "\n")
    return plan


def _inputs(job: Job, scene: Scene) -> dict[str, str]:
    """Sum up what is read, so that a build never goes on with other imagery."""
    items = "\n".join(f"{item.modality} {item.id} {item.date}" for item in scene.items)
    files = {Path(asset.href) for item in scene.items for asset in item.assets}
    paths = [*sorted(files), *(Path(p) for p in (job.choice.places, job.choice.osm) if isinstance(p, str))]
    sizes = "\n".join(f"{path} {path.stat().st_size}" for path in paths if path.is_file())
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("items", items), ("files", sizes))}


def _note(root: Path, window: Window) -> Path:
    """Say which file tells that a window is done, and how."""
    return root / "parts" / f"{window.name}.json"


def _make_part(
    root: Path, window: Window, job: Job, modalities: Sequence[str], imagery: Imagery, osm: Features | None
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
        content |= {"exact": digest(samples.values()), "thumbnail": thumbnail(layers)}
    write_whole(note, json.dumps(content) + "\n")


def _read_window(
    window: Window, job: Job, modalities: Sequence[str], imagery: Imagery, osm: Features | None
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
    (lon,), (lat,) = lonlat(box.crs, [x], [y])
    return lat, lon


def _conclude(root: Path, job: Job, plan: Plan) -> None:
    """Leave out duplicates and write one corpus per split, then the tables and last the report."""
    notes = [read_json(_note(root, window), "remove it to have that window made again") for window in plan.windows]
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
    write_whole(root / "report.json", json.dumps(report, indent=1) + "\n")
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


def _write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with unfinished(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(head)
        table.writerows(rows)


def _finished(root: Path) -> Built:
    shutil.rmtree(root / "parts", ignore_errors=True)
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    return Built(root=root, corpora={name: root / folder for name, folder in report["corpora"].items()}, report=report)
