"""From what somebody wants to a scene on disk."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
import rasterio
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.files import claimed, read_json
from panterra.imagery.choose import Candidate
from panterra.imagery.composite import blocks, compose_block
from panterra.imagery.declared import DECLARED
from panterra.imagery.download import Advance, fetch_pieces, save_json
from panterra.imagery.items import SceneItem
from panterra.imagery.providers import LICENCE, Provider, licence_fields, licence_of
from panterra.imagery.raster import CogWriter
from panterra.imagery.stac import SCENE_FILE, Scene, make_item, modality_grid, open_scene, save_scene
from panterra.imagery.wish import Connect, Image, Plan, Wish, connect, make_plan
from panterra.modalities import MODALITIES, Modality

Stage = Callable[[str], Advance]
"""Called with what begins; gives what is to be called with the steps done and their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A scene, what was decided on the way, and what could not be fetched, one sentence each."""

    scene: Scene
    decisions: tuple[str, ...]
    failures: tuple[str, ...]
    received: int
    """Bytes that came over the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Storage:
    """Where what comes over the network is kept."""

    pieces: Path
    searches: Path
    offline: bool = False
    keeps_failures: bool = False


def list_pull(
    wish: Wish, providers: Sequence[Provider], *, replay: Path | None = None, connect: Connect = connect
) -> Plan:
    """Search and choose, and fetch nothing."""
    if replay is not None:
        return make_plan(wish, providers, replay, offline=True)
    with tempfile.TemporaryDirectory(prefix="panterra-") as folder:
        return make_plan(wish, providers, Path(folder), connect=connect)


def pull(
    wish: Wish,
    providers: Sequence[Provider],
    out: str | Path,
    *,
    cache: Path | None = None,
    record: Path | None = None,
    replay: Path | None = None,
    title: str | None = None,
    overwrite: bool = False,
    connect: Connect = connect,
    stage: Stage | None = None,
) -> Pulled:
    """Fetch what a wish names and write it as a scene; a killed run goes on where it was and ends with the same bytes.

    Everything is made in `<out>.parts` and appears as `out` when it is complete. A file that cannot be fetched costs
    the image it belongs to; the result is made of the others and says so. What came over the network stays in `cache`
    for other runs, or together with the answers of the searches in `record`, from which `replay` makes the same scene
    without a network.
    """
    out = Path(out)
    parts = out.with_name(f"{out.name}.parts")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another name, or replace it with --overwrite")
    if out.exists() and not (out / SCENE_FILE).is_file():
        raise InputError(f"{out} is no scene and is not replaced; choose another name")
    storage = _storage(parts, cache, record, replay)
    with claimed(parts, str(out)):
        plan = make_plan(wish, providers, storage.searches, offline=storage.offline, connect=connect)
        _begin(parts, plan.job, overwrite=overwrite)
        pieces, failures, received = _fetch(plan, storage, connect, stage)
        items, decisions = [], list(plan.decisions)
        made = stage("composing") if stage else None
        for number, image in enumerate(plan.images, start=1):
            item = _make(plan, image, pieces[image.area.box], parts / "scene", decisions)
            items += [] if item is None else [item]
            if made:
                made(number, len(plan.images))
        if not items:
            raise InputError(f"no image could be fetched: {failures[0]} (and {len(failures) - 1} more)")
        licences = sorted({str(item.properties.get(LICENCE, item.properties["license"])) for item in items})
        save_scene(parts / "scene", items, title or out.name, "; ".join(licences))
        _replace(parts / "scene", out)
        shutil.rmtree(parts)
    return Pulled(scene=open_scene(out), decisions=tuple(decisions), failures=failures, received=received)


def _storage(parts: Path, cache: Path | None, record: Path | None, replay: Path | None) -> _Storage:
    if sum(folder is not None for folder in (cache, record, replay)) > 1:
        raise InputError("--cache, --record and --replay exclude each other: a recording is a cache, too")
    if replay is not None and not replay.is_dir():
        raise InputError(f"there is no recording {replay}; make one with --record {replay}")
    if replay is not None:
        return _Storage(pieces=replay, searches=replay, offline=True)
    if record is not None:
        return _Storage(pieces=record, searches=record, keeps_failures=True)
    return _Storage(pieces=cache or parts / "pieces", searches=parts / "searches")


def _begin(parts: Path, job: Mapping[str, Any], *, overwrite: bool) -> None:
    """Open the folder of an unfinished job, or start it; parts of another job are never mixed in."""
    note = parts / "job.json"
    before = read_json(note, f"remove {parts} to start afresh") if note.is_file() else None
    if before is not None and before != job:
        keys = sorted(key for key in {*before, *job} if before.get(key) != job.get(key))
        if not overwrite:
            raise InputError(
                f"{parts} holds part of a job with another {', '.join(keys)}; repeat that job to go on with it, "
                "or start afresh with --overwrite"
            )
        shutil.rmtree(parts / "scene", ignore_errors=True)
    save_json(note, job)


def _fetch(
    plan: Plan, storage: _Storage, connect: Connect, stage: Stage | None
) -> tuple[dict[GeoBox, dict[str, Path]], tuple[str, ...], int]:
    """Fetch what each grid needs of each file: the pieces by grid and address, what failed, and the bytes that came."""
    pieces: dict[GeoBox, dict[str, Path]] = {}
    failures: list[str] = []
    received = 0
    wanted: dict[tuple[str, GeoBox], list[Image]] = {}
    for image in plan.images:
        wanted.setdefault((image.provider.name, image.area.box), []).append(image)
    for (name, box), images in wanted.items():
        provider = images[0].provider
        with ExitStack() as stack:
            web = None if storage.offline else stack.enter_context(connect(provider, provider.access()))
            came, failed = fetch_pieces(
                [href for image in images for c in image.candidates for href in _hrefs(c.item, plan.wish)],
                box,
                storage.pieces,
                web,
                readers=provider.readers,
                note_failures=storage.keeps_failures,
                progress=stage(f"fetching from {name}") if stage else None,
            )
            received += web.received if web else 0
        pieces.setdefault(box, {}).update(came)
        failures += failed.values()
    return pieces, tuple(dict.fromkeys(failures)), received


def _hrefs(item: SceneItem, wish: Wish) -> list[str]:
    masks = [item.mask[0]] if item.mask and wish.mask_clouds else []
    return [asset.href for asset in item.assets] + masks


# Making the images ----------------------------------------------------------------------------------------------------


def _make(
    plan: Plan, image: Image, pieces: Mapping[str, Path], folder: Path, decisions: list[str]
) -> pystac.Item | None:
    """Write an image of what could be fetched, unless it is there; None where that is nothing."""
    wish = plan.wish
    days = [[c for c in day if all(href in pieces for href in _hrefs(c.item, wish))] for day in image.days]
    used = [candidate for day in days for candidate in day]
    if len(used) < len(image.candidates):
        what = f"made of {len(used)} of {len(image.candidates)} images" if used else "left out"
        lost = ", ".join(c.item.id for c in image.candidates if c not in used)
        decisions.append(f"{image.id}: {what}; could not be fetched: {lost}")
    path = folder / f"{image.id}.tif"
    if not used:
        path.unlink(missing_ok=True)
        return None
    sources = " ".join(candidate.item.id for candidate in used)
    box = image.area.grid(image.modality)
    if not _is_made(path, sources):
        local = [[_local(c.item, pieces, wish) for c in day] for day in days if day]
        _write(path, local, MODALITIES[image.modality], box, wish, sources)
    return _describe(image, used, box, path, wish)


def _local(item: SceneItem, pieces: Mapping[str, Path], wish: Wish) -> SceneItem:
    """Put the pieces in the place of the remote files."""
    assets = tuple(replace(asset, href=str(pieces[asset.href])) for asset in item.assets)
    mask = (str(pieces[item.mask[0]]), item.mask[1]) if item.mask and wish.mask_clouds else None
    return replace(item, assets=assets, mask=mask, grid=None)


def _is_made(path: Path, sources: str) -> bool:
    """Tell whether an image was finished before, of the same sources."""
    if not path.is_file():
        return False
    with rasterio.open(path) as made:
        return bool(made.tags().get("SOURCES") == sources)


def _write(
    path: Path, days: Sequence[Sequence[SceneItem]], spec: Modality, box: GeoBox, wish: Wish, sources: str
) -> None:
    how = "best" if spec.kind == "still" else wish.composite
    scene = Scene(items=tuple(item for day in days for item in day), apply_masks=wish.mask_clouds)
    grid = modality_grid(spec, box)
    grow_px = math.ceil(wish.grow_m / grid.resolution.x)
    dtype, nodata = storage_type(spec)
    tags = {"SOURCES": sources}
    with CogWriter(path, grid, len(spec.bands), dtype, nodata=nodata, band_names=spec.band_names, tags=tags) as writer:
        for part, window in blocks(spec, box):
            pixels, valid = compose_block(scene, days, part, how, grow_px=grow_px, s2cloudless=wish.s2cloudless)
            writer.write(window, to_storage(pixels, valid, dtype, nodata))


def storage_type(spec: Modality) -> tuple[np.dtype[Any], float]:
    """Choose the type in which a modality is written, and the value that marks missing pixels."""
    nodata = spec.nodata if spec.nodata is not None else -32768.0
    # Of digital numbers that somebody declared nobody knows how large they are.
    unknown = spec.unit == "dn" and spec.nodata is None and spec.name in DECLARED
    if unknown or spec.unit not in ("reflectance_1e4", "dn", "code"):
        return np.dtype(np.float32), nodata
    if nodata < 0:
        return np.dtype(np.int16), nodata
    return np.dtype(np.uint8 if spec.unit == "code" else np.uint16), nodata


def to_storage(
    pixels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], dtype: np.dtype[Any], nodata: float
) -> npt.NDArray[Any]:
    """Round to whole numbers where the type holds no others; data never become the value of missing pixels.

    Where that is 0, what is 0 or less, as dark water may be without the offset of Sentinel-2, becomes 1.
    """
    if dtype.kind == "f":
        stored = pixels.astype(dtype)
    else:
        limits = np.iinfo(dtype)
        stored = np.rint(pixels).clip(max(limits.min, nodata + 1), limits.max).astype(dtype)
    stored[:, ~valid] = nodata
    return stored


def _describe(image: Image, used: Sequence[Candidate], box: GeoBox, path: Path, wish: Wish) -> pystac.Item:
    spec = MODALITIES[image.modality]
    item = make_item(image.id, image.modality, image.date, modality_grid(spec, box), {"pixels": path})
    item.properties |= {
        **licence_fields(licence_of(image.modality)),
        "panterra:provider": image.provider.name,
        "panterra:composite": "best" if spec.kind == "still" else wish.composite,
        "panterra:sources": [{"id": c.item.id, "collection": c.collection} for c in used],
        "panterra:decisions": sorted({decision for c in used for decision in c.item.decisions}),
    }
    if image.first != image.last:
        item.properties["start_datetime"] = f"{image.first}T00:00:00Z"
        item.properties["end_datetime"] = f"{image.last}T23:59:59Z"
    return item


def _replace(made: Path, out: Path) -> None:
    """Put a finished folder in its place, which another may hold."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    made.replace(out)
    shutil.rmtree(old, ignore_errors=True)
