"""From a scene to stored embeddings or a map, in tiles."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
import pystac
import rasterio
from odc.geo.geobox import GeoBox
from rasterio.windows import Window as FileWindow

from panterra.energy import EnergyReport
from panterra.energy.impact import Impact, impact_of
from panterra.errors import InputError
from panterra.evaluate.probes import Probe, load_probe
from panterra.finetune.model import FineTuned, is_finetuned, load_finetuned
from panterra.imagery.raster import CogWriter
from panterra.imagery.stac import Scene, open_scene
from panterra.mapping.areas import Area, lay_grid, parse_crs, read_area
from panterra.mapping.cluster import check_on, painters
from panterra.mapping.effort import Account, accounted
from panterra.mapping.embeddings import (
    DTYPES,
    INT8_RULE,
    NO_BYTE,
    Dtype,
    EmbeddingStore,
    cog_band_names,
    cog_bands,
    cog_tags,
    create_zarr,
    open_embeddings,
    write_zarr,
)
from panterra.mapping.parts import Failure, IncompleteError, Parts
from panterra.mapping.passport import write_passport
from panterra.mapping.seams import KEYS, PROPERTY, SeamScore, seam_score, tile_seams
from panterra.mapping.sources import Encoding, Stored
from panterra.mapping.tiles import Borders, Tile
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
    cog = out.suffix.lower() in (".tif", ".tiff")
    if dtype not in DTYPES:
        raise InputError(f"embeddings of type {dtype!r} were asked for; wanted one of {', '.join(DTYPES)}")
    if cog and dtype == "float16":
        raise InputError(
            f"{out.name} cannot hold float16, which GeoTIFFs lack; choose int8 or float32, or a .zarr name"
        )
    work = Encoding.plan(
        scene,
        encoder,
        box=_one_grid(box, crs) or common_grid(scene, encoder, modalities, crs=crs, area=area),
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

    def about() -> dict[str, Any]:
        return {**work.about, "licence": scene.licence}

    parts = Parts(out, {**work.job, "dtype": dtype}, overwrite=overwrite)
    sink: _Cogs | _Zarr
    if cog:
        names, nodata = cog_band_names(encoder.dim, dtype), NO_BYTE if dtype == "int8" else math.nan
        sink = _Cogs(
            parts=parts,
            convert=lambda features: {"embeddings": cog_bands(features, dtype)},
            tiles=work.tiles,
            borders=work.borders,
            create=lambda folder: {
                "embeddings": CogWriter(
                    folder / out.name,
                    work.grid,
                    len(names),
                    dtype,
                    nodata=nodata,
                    band_names=names,
                    tags=cog_tags(about(), dtype),
                )
            },
        )
    else:
        rows, cols = work.lattice.rows, work.lattice.cols
        sink = _Zarr(
            parts=parts,
            num_tiles=work.lattice.num_tiles,
            borders=work.borders,
            create=lambda path: create_zarr(
                path,
                work.grid,
                dim=encoder.dim,
                dtype=dtype,
                shard=(rows.tile, cols.tile),
                chunk=(rows.stride, cols.stride),
                about=about(),
            ),
        )
    account = _run(
        "embed", work, parts, sink, on=on, country=country, budget_kwh=budget_kwh, progress=progress, note=note
    )
    media_type = pystac.MediaType.COG if cog else "application/vnd.zarr; version=3"
    asset = pystac.Asset(str(out.absolute()), media_type=media_type, roles=["data"], extra_fields={"data_type": dtype})
    about_embeddings = {
        "emb:type": "pixel",
        "emb:dimensions": encoder.dim,
        **({"emb:quantization": INT8_RULE} if dtype == "int8" else {}),
    }
    _conclude(work, parts, {"embeddings": asset}, account.total, about_embeddings)
    return _complete(open_embeddings(out), work, parts)


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
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise InputError(f"a map is written as a GeoTIFF; let the name {out.name!r} end in .tif")
    if probabilities and probe.task != "classes":
        raise InputError("the probe predicts values, which have no probabilities; leave them out")
    work: Encoding | Stored
    if isinstance(scene, EmbeddingStore) or (not isinstance(scene, Scene) and _is_store(scene)):
        if isinstance(probe, FineTuned):
            raise InputError("a fine-tuned model maps scenes, not stored embeddings; give the scene itself")
        if any(given is not None for given in (box, crs, aoi, model)):
            raise InputError("stored embeddings have their own area and encoder; leave out box, crs, aoi and model")
        store = scene if isinstance(scene, EmbeddingStore) else open_embeddings(scene)
        work = Stored(store=store, workers=workers)
    else:
        work = encoding_for(
            probe,
            scene,
            model=model,
            box=_one_grid(box, crs),
            crs=crs,
            area=read_area(aoi) if aoi is not None else None,
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
    assets = {"map": _map_asset(probe, out)}
    if beside is not None:
        bands = [{"name": c.name} for c in probe.classes]
        assets["probabilities"] = _tif_asset(beside, bands=bands, data_type="float32")
    parts = Parts(out, {**work.job, "probe": about_probe, "probabilities": probabilities}, overwrite=overwrite)
    sink = _map_sink(probe, work, out, beside, parts)
    account = _run(
        "map", work, parts, sink, on=on, country=country, budget_kwh=budget_kwh, progress=progress, note=note
    )
    seams = _conclude(work, parts, assets, account.total, {"panterra:probe": about_probe})
    result = MapResult(
        path=out,
        passport=_beside(out),
        probabilities=beside,
        seconds=time.perf_counter() - started,
        encoder_seconds=work.encoder_seconds,
        energy=account.energy,
        impact=impact_of(account.total),
        area_km2=work.area_km2,
        seams=seams,
    )
    return _complete(result, work, parts)


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


def _run(
    command: str,
    work: Encoding | Stored,
    parts: Parts,
    sink: _Cogs | _Zarr,
    *,
    on: str,
    country: str | None,
    budget_kwh: float | None,
    progress: Progress | None,
    note: Note | None,
) -> Account:
    """Bring every tile into the sink; the thread that writes also applies the probe, while the encoder goes on."""
    advance = counting(work, progress)
    with accounted(command, work, parts, country=country, budget_kwh=budget_kwh, note=note) as account:
        if isinstance(work, Encoding):
            _standardise(work, parts, note)
        with parts.guard(), sink:
            finished = [tile for tile in work.tiles() if parts.has(tile)] if len(parts) else []
            for tile in finished:
                sink.again(tile)
            advance(sum(work.cost(tile) for tile in finished))
            todo = (tile for tile in work.tiles() if not parts.has(tile))
            in_a_row = 0
            with painters(on, work, parts, note) as canvases, ThreadPoolExecutor(1, "panterra-write") as writer:
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


def _complete(result: Result, work: Encoding | Stored, parts: Parts) -> Result:
    """Return what was made, or raise IncompleteError where tiles are missing in it."""
    if not parts.failed:
        return result
    name, reason = next(iter(parts.failed.items()))
    raise IncompleteError(
        f"{parts.out} is complete but for {len(parts.failed)} of {sum(1 for _ in work.tiles())} tiles, which are "
        f"nodata (the passport lists them): tile {name} {reason}; the others are kept in {parts.folder}, and the same "
        "job tries these again",
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
            fresh = saved.with_name(f"{saved.name}.tmp")
            fresh.write_text(json.dumps(fitted), encoding="utf-8")
            fresh.replace(saved)
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


def _conclude(
    work: Encoding | Stored,
    parts: Parts,
    assets: Mapping[str, pystac.Asset],
    energy: EnergyReport,
    properties: Mapping[str, Any],
) -> SeamScore:
    """Tell how far borders show, write the passport and take the parts away, unless tiles are to be tried again."""
    with parts.guard():
        seams = seam_score(work.tiles(), lambda t: None if t.name in parts.failed else parts.load(t, KEYS))
        write_passport(
            _beside(parts.out),
            work.grid,
            work.dates,
            assets,
            energy=energy,
            area_km2=work.area_km2,
            licence=work.licence,
            properties={
                **properties,
                **work.origin,
                "panterra:encoder_seconds": round(work.encoder_seconds, 3),
                PROPERTY: seams.as_dict(),
                **({"panterra:failed_tiles": _failed_tiles(work, parts)} if parts.failed else {}),
            },
        )
        if not parts.failed:
            parts.remove()
    return seams


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
    return (Path(path) / "zarr.json").is_file() or Path(path).suffix.lower() in (".tif", ".tiff")


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


def _one_grid(box: GeoBox | None, crs: str | None) -> GeoBox | None:
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


@dataclass(slots=True, kw_only=True)
class _Cogs:
    """Tiles into GeoTIFFs. Their pixels are kept in the parts as well: a GeoTIFF cannot be gone on with."""

    parts: Parts
    tiles: Callable[[], Iterable[Tile]]
    borders: tuple[Borders, Borders]
    convert: Callable[[np.ndarray], dict[str, np.ndarray]]
    """Makes the pixels of each file from features [h, w, D]."""
    create: Callable[[Path], dict[str, CogWriter]]
    """Opens the files in a folder, each under its final name."""
    _writers: dict[str, CogWriter] = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _Cogs:
        self._writers = self.create(self.parts.folder)
        for writer in self._writers.values():
            self._open.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if kind is None:
            for name, writer in self._writers.items():
                self._check(name, writer.path)
            for writer in self._writers.values():
                for name in (f"{writer.path.name}.aux.xml", writer.path.name):
                    fresh, final = self.parts.folder / name, self.parts.out.with_name(name)
                    if fresh.exists():
                        fresh.replace(final)
                    else:
                        final.unlink(missing_ok=True)

    def put(self, tile: Tile, features: np.ndarray) -> None:
        pixels = self.convert(features)
        self.parts.save(tile, {**pixels, **tile_seams(features, tile, self.borders)})
        self._write(tile, pixels)

    def again(self, tile: Tile) -> None:
        self._write(tile, self.parts.load(tile))

    def _write(self, tile: Tile, pixels: Mapping[str, np.ndarray]) -> None:
        for name, writer in self._writers.items():
            writer.write(_file_window(tile), pixels[name])

    def _check(self, name: str, path: Path) -> None:
        """Compare a file with the tiles: GDAL does not always say when a disk is full."""
        with rasterio.open(path) as file:
            for tile in (tile for tile in self.tiles() if tile.name not in self.parts.failed):
                written = self.parts.load(tile)[name]
                if not np.array_equal(
                    file.read(window=_file_window(tile)), written.reshape(-1, *written.shape[-2:]), True
                ):
                    raise OSError(f"{path.name} does not hold what was written, as happens on a full disk")


def _file_window(tile: Tile) -> FileWindow:
    return FileWindow(tile.core.col, tile.core.row, tile.core.width, tile.core.height)


@dataclass(slots=True, kw_only=True)
class _Zarr:
    """Tiles into a Zarr store, one shard each, so that a killed job finds its shards whole."""

    parts: Parts
    num_tiles: int
    borders: tuple[Borders, Borders]
    create: Callable[[Path], None]

    @property
    def _path(self) -> Path:
        return self.parts.folder / "store"

    def __enter__(self) -> _Zarr:
        moved = len(self.parts) == self.num_tiles and self.parts.out.exists()
        if not self._path.exists() and not moved:
            self.parts.forget()
            fresh = self.parts.folder / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            self.create(fresh)
            fresh.replace(self._path)
        # What zarr had begun to write when the job was killed.
        for leftover in self._path.rglob("*.partial"):
            leftover.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        out = self.parts.out
        if kind is None and self._path.exists():
            if out.exists():
                shutil.rmtree(self.parts.folder / "replaced", ignore_errors=True)
                out.replace(self.parts.folder / "replaced")
            (self._copy() if self.parts.failed else self._path).replace(out)

    def _copy(self) -> Path:
        """Copy a store to which tiles are still to be added; shards, which are only ever replaced, are linked."""
        copy = self.parts.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(self._path, copy, copy_function=os.link)
        except OSError:  # a file system without links
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self._path, copy)
        return copy

    def put(self, tile: Tile, features: np.ndarray) -> None:
        write_zarr(self._path, tile.core, features)
        self.parts.save(tile, tile_seams(features, tile, self.borders))

    def again(self, tile: Tile) -> None:
        """Nothing is to be done: its shard is in the store."""


def _map_sink(probe: Probe | FineTuned, work: Encoding | Stored, out: Path, beside: Path | None, parts: Parts) -> _Cogs:
    """Write predictions into `out` and probabilities into `beside`."""
    nodata, dtype = map_nodata(probe)
    categories = {c.code: c.name for c in probe.classes}
    palette = {c.code: c.colour for c in probe.classes if c.colour is not None}

    def convert(features: np.ndarray) -> dict[str, np.ndarray]:
        seen = np.isfinite(features).all(-1)
        pixels = {"map": np.full(seen.shape, nodata, dtype)}
        pixels["map"][seen] = probe.predict(features[seen])
        if beside is not None:
            pixels["probabilities"] = np.full((len(probe.classes), *seen.shape), np.nan, np.float32)
            pixels["probabilities"][:, seen] = probe.probabilities(features[seen]).T
        return pixels

    def create(folder: Path) -> dict[str, CogWriter]:
        classes = CogWriter(
            folder / out.name,
            work.grid,
            1,
            dtype,
            nodata=nodata,
            palette=palette if dtype == "uint8" else None,
            categories=categories or None,
        )
        writers = {"map": classes}
        if beside is not None:
            names = [c.name for c in probe.classes]
            writers["probabilities"] = CogWriter(
                folder / beside.name, work.grid, len(names), "float32", nodata=math.nan, band_names=names
            )
        return writers

    return _Cogs(parts=parts, tiles=work.tiles, borders=work.borders, convert=convert, create=create)


def map_nodata(probe: Probe | FineTuned) -> tuple[float, str]:
    """Choose a value that is no class, 0 where it is free, and the smallest type that holds it and the codes."""
    if probe.task == "values":
        return math.nan, "float32"
    codes = {c.code for c in probe.classes}
    if min(codes) < 0 or max(codes) > 65534:
        raise InputError(f"the class codes go from {min(codes)} to {max(codes)}; a map holds 0 to 65534")
    free = next(value for value in (0, 255, 65535) if value not in codes)
    return free, "uint8" if max(*codes, free) < 256 else "uint16"


def _map_asset(probe: Probe | FineTuned, out: Path) -> pystac.Asset:
    nodata, dtype = map_nodata(probe)
    classes = [
        {
            "value": c.code,
            "name": c.name,
            **({"color_hint": "{:02X}{:02X}{:02X}".format(*c.colour)} if c.colour else {}),
        }
        for c in probe.classes
    ]
    fields = {"classification:classes": classes} if classes else {}
    return _tif_asset(out, data_type=dtype, nodata="nan" if math.isnan(nodata) else nodata, **fields)


def _tif_asset(path: Path, **fields: Any) -> pystac.Asset:
    return pystac.Asset(str(path.absolute()), media_type=pystac.MediaType.COG, roles=["data"], extra_fields=fields)


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
