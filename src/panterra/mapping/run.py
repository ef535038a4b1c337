"""From a scene to stored embeddings or a map, in tiles."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pystac
from odc.geo.geobox import GeoBox

from panterra.energy import EnergyReport
from panterra.energy.impact import Impact, impact_of
from panterra.errors import InputError
from panterra.evaluate.probes import Probe, load_probe
from panterra.files import write_whole
from panterra.finetune.model import FineTuned, is_finetuned, load_finetuned
from panterra.imagery.stac import Scene, open_scene
from panterra.mapping.areas import Area, Coverage, cut_store, lay_grid, parse_crs, read_area
from panterra.mapping.cluster import check_on, painters
from panterra.mapping.effort import Account, accounted
from panterra.mapping.embeddings import (
    DTYPES,
    INT8_RULE,
    Dtype,
    EmbeddingStore,
    open_embeddings,
)
from panterra.mapping.parts import Failure, IncompleteError, Parts
from panterra.mapping.passport import write_passport
from panterra.mapping.seams import KEYS, PROPERTY, SeamScore, seam_score
from panterra.mapping.sinks import Sink, embedding_sink, is_tif, map_asset, map_sink, tif_asset
from panterra.mapping.sources import Encoding, Stored
from panterra.modalities import MODALITIES
from panterra.models import weights
from panterra.models.features import Encoder, Fitted
from panterra.sample import Batch

Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with how many windows (of stored embeddings: blocks) are done and how many there are."""
Note = Callable[[str], None]
"""Told in a sentence what else is being done."""

FAILURES_AT_FIRST, FAILURES_IN_A_ROW = 3, 100
"""So many failed tiles, before the first good one or one after the other, stop a job: it is not the tiles."""

STATISTICS_BYTES = 2**25
"""What the pixels of a block may take where statistics are fitted; several copies of it are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapResult:
    """What `map` wrote and what it took; a run that went on with an earlier one counts only itself."""

    path: Path
    passport: Path
    probabilities: Path | None
    seconds: float
    encoder_seconds: float
    energy: EnergyReport
    impact: Impact
    """Of all starts of the run together."""
    area_km2: float
    seams: SeamScore


def embed(
    scene: Scene | str | Path,
    model: Encoder | str | Path,
    out: str | Path,
    *,
    patch_m: float = 40,
    modalities: Sequence[str] | None = None,
    window_px: int = 64,
    overlap_px: int = 16,
    dtype: Dtype = "float32",
    box: GeoBox | None = None,
    crs: str | None = None,
    aoi: str | Path | Area | None = None,
    tile_px: int | None = None,
    batch_windows: int = 8,
    workers: int = 1,
    on: str = "local",
    overwrite: bool = False,
    country: str | None = None,
    budget_kwh: float | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> EmbeddingStore:
    """Embed a scene: one vector per patch, as a Zarr v3 store, or as a GeoTIFF where `out` ends in .tif.

    The encoder sees windows of `window_px` pixels of the common grid that overlap by `overlap_px` and lie on a lattice
    anchored at the upper left corner of `box` (default: the whole scene); features of overlapping windows are blended.
    Tiles of at most `tile_px` are units of work alone: their size changes the result by rounding, below 1e-4.
    `batch_windows` go through the encoder together; `workers` tiles are read ahead.

    The common grid has pixels of 10 m, or those of the finest modality where all are coarser. It is in the projected
    `crs`, such as "EPSG:3035", or in the one that `panterra.imagery.grids.common_crs` chooses for images in several.
    Only what lies inside `aoi` is mapped, a vector file or "west,south,east,north" in degrees: the rest is nodata and
    costs no work. An encoder that has no
    statistics of what it is to be shown (see `Fitted`) gets those of everything in the box, fitted once beforehand.

    Finished tiles lie in `<out>.parts`: after any interruption the same call goes on from there and ends with the same
    bytes. Raises InputError where `out` exists or the parts are of another job, unless `overwrite`.

    `on` says where tiles are computed: in this process, in others ("processes:4") or on a Ray cluster ("ray", or
    "ray://HOST:10001"), with the same bytes; see `panterra.mapping.cluster`.

    A tile that cannot be made is tried again, then left without data: the output is complete but for such tiles, its
    passport lists them, and IncompleteError is raised. The same call tries them again.

    `budget_kwh` is what all starts of the job may take: BudgetError is raised beforehand where jobs like it have taken
    more, and between tiles when it is used up.
    """
    area = read_area(aoi) if aoi is not None else None
    encoder, scene, out = _as_encoder(model), _as_scene(scene), Path(out)  # a model may declare modalities of its own
    cog = is_tif(out)
    if dtype not in DTYPES:
        raise InputError(f"embeddings of type {dtype!r} were asked for; wanted one of {', '.join(DTYPES)}")
    if cog and dtype == "float16":
        raise InputError(
            f"{out.name} cannot hold float16, which GeoTIFFs lack; choose int8 or float32, or a .zarr name"
        )
    work = Encoding.plan(
        scene,
        encoder,
        box=one_grid(box, crs) or common_grid(scene, encoder, modalities, crs=crs, area=area),
        patch_m=patch_m,
        modalities=modalities,
        area=area,
        window_px=window_px,
        overlap_px=overlap_px,
        tile_px=tile_px,
        batch_windows=batch_windows,
        workers=workers,
    )

    check_on(on, work, budget_kwh)

    parts = Parts(out, {**work.job, "dtype": dtype}, overwrite=overwrite)
    sink = embedding_sink(work, out, dtype, parts)
    account = compute(
        "embed", work, parts, sink, on=on, country=country, budget_kwh=budget_kwh, progress=progress, note=note
    )
    media_type = pystac.MediaType.COG if cog else "application/vnd.zarr; version=3"
    asset = pystac.Asset(str(out.absolute()), media_type=media_type, roles=["data"], extra_fields={"data_type": dtype})
    about_embeddings = {
        "emb:type": "pixel",
        "emb:dimensions": encoder.dim,
        **({"emb:quantization": INT8_RULE} if dtype == "int8" else {}),
    }
    seams = _seams(work, parts)
    conclude(work, parts, {"embeddings": asset}, account.total, {**about_embeddings, PROPERTY: seams.as_dict()})
    return complete(open_embeddings(out), work, parts)


def map(
    scene: Scene | EmbeddingStore | str | Path,
    probe: Probe | FineTuned | str | Path,
    out: str | Path,
    *,
    model: Encoder | str | Path | None = None,
    box: GeoBox | None = None,
    crs: str | None = None,
    aoi: str | Path | Area | None = None,
    probabilities: bool = False,
    patch_m: float | None = None,
    modalities: Sequence[str] | None = None,
    window_px: int | None = None,
    overlap_px: int | None = None,
    tile_px: int | None = None,
    batch_windows: int = 8,
    workers: int = 1,
    on: str = "local",
    overwrite: bool = False,
    country: str | None = None,
    budget_kwh: float | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> MapResult:
    """Map a scene, or embeddings that `embed` stored, with a probe: a GeoTIFF `out` with one pixel per patch.

    A fine-tuned model, or its folder, takes the place of the probe: it brings its own encoder, and its scores are
    blended as features are, on the grid of its answer. It maps scenes alone.

    Classes are written as their codes with palette and names, values as float32; places without data are nodata.
    Of stored embeddings, which keep their grid, `box` (in their CRS) or `aoi` cut out what is mapped and read.
    `probabilities` adds `<out>_probabilities.tif`, one float32 band per class. What the encoder should be, which
    modalities it sees and how large patches and windows are comes from the probe where it is not given; stored
    embeddings need no encoder. Statistics that the probe's features were standardised by go before all others. Windows
    overlap by 16 px, or as the fine-tuned model says.
    Everything else is as in `embed`.
    """
    started, out = time.perf_counter(), Path(out)
    probe = as_probe(probe) if isinstance(probe, str | Path) else probe
    if probe.task == "boxes":
        raise InputError("the model finds objects, which are listed rather than mapped; use panterra detect")
    if not is_tif(out):
        raise InputError(f"a map is written as a GeoTIFF; let the name {out.name!r} end in .tif")
    if probabilities and probe.task != "classes":
        raise InputError("the probe predicts values, which have no probabilities; leave them out")
    area = read_area(aoi) if aoi is not None else None
    work: Encoding | Stored
    cut: Coverage | None = None
    if isinstance(scene, EmbeddingStore) or (not isinstance(scene, Scene) and _is_store(scene)):
        if isinstance(probe, FineTuned):
            raise InputError("a fine-tuned model maps scenes, not stored embeddings; give the scene itself")
        if model is not None:
            raise InputError("stored embeddings need no encoder; leave out model")
        if crs is not None:
            raise InputError(
                "stored embeddings keep the grid they were made on, as vectors between its patches are not known; "
                "leave out crs, or map the scene itself"
            )
        store = scene if isinstance(scene, EmbeddingStore) else open_embeddings(scene)
        if box is not None or area is not None:
            store, cut = cut_store(store, box=box, area=area)
        work = Stored(store=store, workers=workers)
    else:
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
    check_on(on, work, budget_kwh)
    about_probe = _probe_passport(probe)
    beside = out.with_name(f"{out.stem}_probabilities.tif") if probabilities else None
    assets = {"map": map_asset(probe, out)}
    if beside is not None:
        bands = [{"name": c.name} for c in probe.classes]
        assets["probabilities"] = tif_asset(beside, bands=bands, data_type="float32")
    within = {} if cut is None else {"box": [*cut.grid.shape, *tuple(cut.grid.affine)[:6]], "area": cut.fingerprint}
    job = {**work.job, **within, "probe": about_probe, "probabilities": probabilities}
    parts = Parts(out, job, overwrite=overwrite)
    sink = map_sink(probe, work, out, beside, parts)
    account = compute(
        "map", work, parts, sink, on=on, country=country, budget_kwh=budget_kwh, progress=progress, note=note
    )
    seams = _seams(work, parts)
    area_km2 = work.area_km2 if cut is None else cut.area_km2
    told = {
        "panterra:probe": about_probe,
        "panterra:options": {**work.origin["panterra:options"], **within},
        PROPERTY: seams.as_dict(),
    }
    conclude(work, parts, assets, account.total, told, area_km2=area_km2)
    result = MapResult(
        path=out,
        passport=_beside(out),
        probabilities=beside,
        seconds=time.perf_counter() - started,
        encoder_seconds=work.encoder_seconds,
        energy=account.energy,
        impact=impact_of(account.total),
        area_km2=area_km2,
        seams=seams,
    )
    return complete(result, work, parts)


def encoding_for(
    probe: Probe | FineTuned,
    scene: Scene | str | Path,
    *,
    model: Encoder | str | Path | None,
    box: GeoBox | None,
    patch_m: float | None,
    modalities: Sequence[str] | None,
    window_px: int | None,
    overlap_px: int | None,
    tile_px: int | None,
    batch_windows: int,
    workers: int,
    crs: str | None = None,
    area: Area | None = None,
) -> Encoding:
    """Plan the features that a probe or a fine-tuned model needs; it says what is not given."""
    source, tuned = probe.source, probe if isinstance(probe, FineTuned) else None
    if tuned is not None and model is not None:
        raise InputError("a fine-tuned model has its own encoder; leave out model")
    if source is None and (model is None or patch_m is None):
        raise InputError("the probe does not say how its features were made; give model and patch_m")
    encoder = tuned or _as_encoder(cast("Encoder | str | Path", model or (source and source.encoder)))
    if source is not None and source.statistics and isinstance(encoder, Fitted):
        encoder = encoder.with_statistics(source.statistics)
    scene = tuned.narrow(_as_scene(scene)) if tuned else _as_scene(scene)
    seen = modalities or (source.modalities if source else None)
    return Encoding.plan(
        scene,
        encoder,
        box=box if box is not None else common_grid(scene, encoder, seen, crs=crs, area=area),
        area=area,
        patch_m=cast(float, patch_m or (source and source.patch_m)),
        modalities=seen,
        window_px=window_px or (source.window_px if source else 64),
        overlap_px=overlap_px if overlap_px is not None else tuned.overlap_px if tuned else 16,
        tile_px=tile_px,
        batch_windows=batch_windows,
        workers=workers,
    )


def compute(
    command: str,
    work: Encoding | Stored,
    parts: Parts,
    sink: Sink,
    *,
    on: str,
    country: str | None,
    budget_kwh: float | None,
    progress: Progress | None,
    note: Note | None,
) -> Account:
    """Bring every tile into the sink; the thread that writes also applies the probe, while the encoder goes on."""
    advance = counting(work, progress)
    with accounted(command, work, parts, on=on, country=country, budget_kwh=budget_kwh, note=note) as account:
        if isinstance(work, Encoding):
            _standardise(work, parts, note)
        with parts.guard(), sink:
            finished = [tile for tile in work.tiles() if parts.has(tile)] if len(parts) else []
            for tile in finished:
                sink.again(tile)
            advance(sum(work.cost(tile) for tile in finished))
            todo = (tile for tile in work.tiles() if not parts.has(tile))
            in_a_row = 0
            with (
                painters(on, work, parts, tell=account.meter.tell, note=note) as canvases,
                ThreadPoolExecutor(1, "panterra-write") as writer,
            ):
                writing: deque[Future[None]] = deque()
                for tile, features in work.features(todo, parts, advance, canvases):
                    if isinstance(features, Failure):
                        in_a_row += 1
                        most = FAILURES_IN_A_ROW if finished or account.tiles else FAILURES_AT_FIRST
                        if in_a_row == most:
                            raise _stopped(parts, f"the last {most} tiles could not be made")
                        continue
                    in_a_row = 0
                    writing.append(writer.submit(sink.put, tile, features))
                    account.finish(tile)
                    if len(writing) > 1:
                        writing.popleft().result()
                for last in writing:
                    last.result()
            if parts.failed and not finished and not account.tiles:
                raise _stopped(parts, "no tile could be made")
    return account


def counting(work: Encoding | Stored, progress: Progress | None) -> Callable[[int], None]:
    """Make what is told of windows as they are done, and tells `progress` how far the whole job is."""
    done, total = 0, sum(work.cost(tile) for tile in work.tiles())

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        if progress:
            progress(done, total)

    return advance


def _stopped(parts: Parts, why: str) -> InputError:
    name, reason = next(reversed(parts.failed.items()))
    return InputError(
        f"stopped, as {why}: tile {name} {reason}; finished tiles are kept in {parts.folder}, and the same job goes on "
        "from there when this is put right"
    )


def complete(result: Result, work: Encoding | Stored, parts: Parts, *, missing: str = "are nodata") -> Result:
    """Return what was made, or raise IncompleteError, with what became of them, where tiles are missing in it."""
    if not parts.failed:
        return result
    name, reason = next(iter(parts.failed.items()))
    raise IncompleteError(
        f"{parts.out} is complete but for {len(parts.failed)} of {sum(1 for _ in work.tiles())} tiles, which "
        f"{missing} (the passport lists them): tile {name} {reason}; the others are kept in {parts.folder}, and the "
        "same job tries these again",
        failed=parts.failed,
        result=result,
    )


def _standardise(work: Encoding, parts: Parts, note: Note | None) -> None:
    """Fit what statistics the encoder lacks to all that it will be shown; a job that goes on finds them in its parts.

    They follow from what `Encoding.job` names already, so they are no part of it: rounding, which depends on threads,
    must not make two jobs of one.
    """
    encoder, saved = work.encoder, parts.folder / "statistics.json"
    missing = encoder.missing_statistics(work.modalities) if isinstance(encoder, Fitted) else ()
    if not isinstance(encoder, Fitted) or not missing:
        return
    if not saved.is_file():
        if note:
            note(f"{work.encoder.name} has no statistics of {', '.join(missing)} yet: fitting them to the scene, once")
        try:
            fitted = encoder.fit_statistics(in_blocks(work.scene, work.box, missing))
        except (InputError, OSError) as error:
            if not len(parts):
                parts.remove()
            raise InputError(f"statistics of {', '.join(missing)} cannot be fitted to the scene: {error}") from error
        with parts.guard():
            write_whole(saved, json.dumps(fitted), sync=True)
    work.encoder = encoder.with_statistics(json.loads(saved.read_text(encoding="utf-8")))
    work.about["model"] = work.origin["panterra:model"] = weights.passport(work.encoder)


def in_blocks(scene: Scene, box: GeoBox, modalities: Sequence[str]) -> Iterator[Batch]:
    """Read all of a scene in a box, one modality after the other, in blocks that fit into memory."""
    height, width = box.shape
    for name in modalities:
        spec, dates = MODALITIES[name], len(scene.dates(name))
        finer = 10.0 / spec.gsd if spec.kind == "still" else 1.0
        side = max(1, int(math.sqrt(STATISTICS_BYTES / (4 * dates * len(spec.bands) * max(finer, 1.0) ** 2))))
        for row in range(0, height, side):
            for col in range(0, width, side):
                yield scene.batch(box[row : min(row + side, height), col : min(col + side, width)], [name])


def _seams(work: Encoding | Stored, parts: Parts) -> SeamScore:
    """Tell how far borders show."""
    with parts.guard():
        return seam_score(work.tiles(), lambda t: None if t.name in parts.failed else parts.load(t, KEYS))


def conclude(
    work: Encoding | Stored,
    parts: Parts,
    assets: Mapping[str, pystac.Asset],
    energy: EnergyReport,
    properties: Mapping[str, Any],
    *,
    area_km2: float | None = None,
) -> None:
    """Write the passport and take the parts away, unless tiles are to be tried again."""
    with parts.guard():
        write_passport(
            _beside(parts.out),
            work.grid,
            work.dates,
            assets,
            energy=energy,
            area_km2=work.area_km2 if area_km2 is None else area_km2,
            licence=work.licence,
            properties={
                **work.origin,
                **properties,
                "panterra:encoder_seconds": round(work.encoder_seconds, 3),
                **({"panterra:failed_tiles": _failed_tiles(work, parts)} if parts.failed else {}),
            },
        )
        if not parts.failed:
            parts.remove()


def _failed_tiles(work: Encoding | Stored, parts: Parts) -> list[dict[str, Any]]:
    """List the tiles that are missing in an output, each with its rows and columns."""
    return [
        {"tile": tile.name, "reason": parts.failed[tile.name], **asdict(tile.core)}
        for tile in work.tiles()
        if tile.name in parts.failed
    ]


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _as_scene(scene: Scene | str | Path) -> Scene:
    return scene if isinstance(scene, Scene) else open_scene(scene)


def _is_store(path: str | Path) -> bool:
    return (Path(path) / "zarr.json").is_file() or is_tif(path)


def common_grid(
    scene: Scene,
    encoder: Encoder,
    modalities: Sequence[str] | None = None,
    *,
    crs: str | None = None,
    area: Area | None = None,
) -> GeoBox:
    """Lay the common grid over a scene: 10 m, or the finest of the modalities to be used where all are coarser."""
    used = [MODALITIES[name] for name in modalities or scene.modalities if name in encoder.modalities]
    sizes = [spec.gsd for spec in used if spec.kind in ("series", "still")]
    resolution = max(10.0, min(sizes, default=10.0))
    return lay_grid(scene, resolution, crs=parse_crs(crs) if crs is not None else None, area=area)


def one_grid(box: GeoBox | None, crs: str | None) -> GeoBox | None:
    """Refuse a box and a CRS for one grid."""
    if box is not None and crs is not None:
        raise InputError("a box has its own CRS; leave out crs, or give an aoi instead of the box")
    return box


def _as_encoder(model: Encoder | str | Path) -> Encoder:
    return weights.load_model(model) if isinstance(model, str | Path) else model


def as_probe(folder: str | Path) -> Probe | FineTuned:
    """Load a probe or a fine-tuned model."""
    return load_finetuned(folder) if is_finetuned(folder) else load_probe(folder)


def check_fit(probe: Probe | FineTuned, work: Encoding | Stored) -> None:
    """Refuse features that the probe was not fitted on, as far as both say what they are."""
    name = (work.about.get("model") or {}).get("name", "the encoder")
    if probe.dim != work.dim:
        raise InputError(
            f"the probe takes features of width {probe.dim}; {name} gives {work.dim}: use the same encoder"
        )
    if probe.source is not None and isinstance(work, Stored):
        wanted = {"patch_m": probe.source.patch_m, "modalities": sorted(probe.source.modalities)}
        stored = {"patch_m": work.about["patch_m"], "modalities": sorted(work.about["modalities"])}
        if stored != wanted:
            raise InputError(f"the embeddings were made with {stored}, the probe was fitted with {wanted}; embed again")
        if probe.source.statistics and work.about["model"].get("statistics", {}) != probe.source.statistics:
            raise InputError(
                f"the embeddings were standardised by other statistics than those that the probe was fitted with; map "
                f"the scene itself, which takes the probe's, instead of {work.store.path}"
            )


def _probe_passport(probe: Probe | FineTuned) -> dict[str, Any]:
    if isinstance(probe, FineTuned):
        return probe.about()
    digest = hashlib.sha256()
    for name, tensor in sorted(probe.tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "kind": probe.kind,
        "task": probe.task,
        "neighbours": probe.neighbours,
        "classes": [{"name": c.name, "code": c.code, "colour": c.colour} for c in probe.classes],
        "sha256": digest.hexdigest(),
    }
