"""From a scene to stored embeddings or a map, in tiles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pystac
import torch
from odc.geo.geobox import GeoBox

from panterra.energy import EnergyReport
from panterra.energy.impact import Impact, impact_of
from panterra.energy.ledger import Note
from panterra.errors import InputError
from panterra.evaluate.probes import Probe
from panterra.finetune.model import FineTuned
from panterra.imagery.stac import Scene, open_scene
from panterra.mapping.areas import Area, Coverage, cut_store, read_area
from panterra.mapping.cluster import check_on
from panterra.mapping.embeddings import DTYPES, INT8_RULE, Dtype, EmbeddingStore, is_tif, open_embeddings
from panterra.mapping.job import Progress, complete, compute, conclude, seams_of
from panterra.mapping.parts import Parts
from panterra.mapping.passport import data_asset, passport_of
from panterra.mapping.probing import about_probe, as_probe, check_fit, encoding_for
from panterra.mapping.seams import PROPERTY, SeamScore
from panterra.mapping.sinks import embedding_sink, map_asset, map_sink
from panterra.mapping.sources import Encoding
from panterra.mapping.stored import Stored
from panterra.models import weights
from panterra.models.features import Encoder


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
    Tiles of at most `tile_px` are units of work alone: their size changes the result by rounding, below 1e-4, or,
    where images are warped into another CRS, by GDAL's approximation of an eighth of a pixel.
    `batch_windows` go through the encoder together; `workers` tiles are read ahead.

    The common grid has pixels of 10 m, or those of the finest modality where all are coarser. It is in the projected
    `crs`, such as "EPSG:3035", or in the one that `panterra.imagery.grids.common_crs` chooses for images in several.
    Only what lies inside `aoi` is mapped, a vector file or "west,south,east,north" in degrees: the rest is nodata and
    costs no work. An encoder that has no statistics of what it is to be shown (see `Fitted`) gets those of everything
    in the box, fitted once beforehand.

    Finished tiles lie in `<out>.parts`: after any interruption the same call goes on from there and ends with the same
    bytes. Raises InputError where another process is making `out`, and, unless `overwrite`, where it exists or the
    parts are of another job.

    `on` says where tiles are computed: in this process, in others ("processes:4") or on a Ray cluster ("ray", or
    "ray://HOST:10001"), with the same bytes; see `panterra.mapping.cluster`.

    A tile that cannot be made is tried again, then left without data: the output is complete but for such tiles, its
    passport lists them, and IncompleteError is raised. The same call tries them again.

    `budget_kwh` is what all starts of the job may take: BudgetError is raised beforehand where jobs like it have taken
    more, and between tiles when it is used up.
    """
    out = Path(out)
    if out.suffix.lower() not in ("", ".zarr", ".tif", ".tiff"):
        raise InputError(
            f"embeddings are written as a Zarr store or a GeoTIFF; let the name {out.name!r} end in .zarr or .tif"
        )
    area = read_area(aoi) if aoi is not None else None
    encoder = weights.load_model(model) if isinstance(model, str | Path) else model
    scene = scene if isinstance(scene, Scene) else open_scene(scene)  # after the model, which may declare modalities
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
    )
    check_on(on, work, budget_kwh)
    parts = Parts(out, {**work.job, "dtype": dtype}, overwrite=overwrite)
    sink = embedding_sink(work, out, dtype, parts)
    account = compute(
        "embed", work, parts, sink, on=on, country=country, budget_kwh=budget_kwh, progress=progress, note=note
    )
    media_type = pystac.MediaType.COG if cog else "application/vnd.zarr; version=3"
    asset = data_asset(out, media_type, data_type=dtype)
    about_embeddings = {
        "emb:type": "pixel",
        "emb:dimensions": encoder.dim,
        **({"emb:quantization": INT8_RULE} if dtype == "int8" else {}),
    }
    seams = seams_of(work, parts)
    conclude(work, parts, {"embeddings": asset}, account.total, {**about_embeddings, PROPERTY: seams.as_dict()})
    return complete(open_embeddings(out), work, parts)


def map(
    scene: Scene | EmbeddingStore | str | Path,
    probe: Probe | FineTuned | str | Path,
    out: str | Path,
    *,
    model: Encoder | str | Path | None = None,
    device: str | torch.device | None = None,
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
    An encoder that is named computes on `device`, a CPU unless told otherwise; one that is given is taken there.
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
        kept = {
            "patch_m": patch_m,
            "modalities": modalities,
            "window_px": window_px,
            "overlap_px": overlap_px,
            "tile_px": tile_px,
        }
        if given := [name for name, value in kept.items() if value is not None]:
            raise InputError(f"stored embeddings are as they were made; leave out {', '.join(given)}, or embed again")
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
    check_on(on, work, budget_kwh)
    answers = about_probe(probe)
    shares = out.with_name(f"{out.stem}_probabilities.tif") if probabilities else None
    assets = {"map": map_asset(probe, out)}
    if shares is not None:
        bands = [{"name": c.name} for c in probe.classes]
        assets["probabilities"] = data_asset(shares, bands=bands, data_type="float32")
    within = {} if cut is None else {"box": [*cut.grid.shape, *tuple(cut.grid.affine)[:6]], "area": cut.fingerprint}
    job = {**work.job, **within, "probe": answers, "probabilities": probabilities}
    parts = Parts(out, job, overwrite=overwrite, beside=shares)
    sink = map_sink(probe, work, out, shares, parts)
    account = compute(
        "map", work, parts, sink, on=on, country=country, budget_kwh=budget_kwh, progress=progress, note=note
    )
    seams = seams_of(work, parts)
    area_km2 = work.area_km2 if cut is None else cut.area_km2
    told = {
        "panterra:probe": answers,
        "panterra:options": {**work.origin["panterra:options"], **within},
        PROPERTY: seams.as_dict(),
    }
    conclude(work, parts, assets, account.total, told, area_km2=area_km2)
    result = MapResult(
        path=out,
        passport=passport_of(out),
        probabilities=shares,
        seconds=time.perf_counter() - started,
        encoder_seconds=work.encoder_seconds,
        energy=account.energy,
        impact=impact_of(account.total),
        area_km2=area_km2,
        seams=seams,
    )
    return complete(result, work, parts)


def _is_store(path: str | Path) -> bool:
    return (Path(path) / "zarr.json").is_file() or is_tif(path)
