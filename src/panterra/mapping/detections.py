"""Objects all over a scene, each once."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pystac
import torch
from affine import Affine
from einops import rearrange
from jaxtyping import Bool, Float, Int
from odc.geo.geobox import GeoBox

from panterra.energy import EnergyReport
from panterra.energy.impact import Impact, impact_of
from panterra.energy.ledger import Note
from panterra.errors import InputError
from panterra.files import write_whole
from panterra.finetune.boxes import SAME, SHAPE, boxes_of, suppress
from panterra.finetune.model import FineTuned, load_finetuned
from panterra.imagery.grids import footprint, lonlat
from panterra.imagery.stac import Scene, open_scene, pixel_metres
from panterra.mapping.areas import Area, read_area
from panterra.mapping.cluster import check_on
from panterra.mapping.detector import Detector
from panterra.mapping.job import Progress, complete, compute, conclude
from panterra.mapping.parts import Parts
from panterra.mapping.passport import data_asset, passport_of
from panterra.mapping.sources import Encoding
from panterra.mapping.tiles import Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """What `detect` wrote and what it took; a run that went on with an earlier one counts only itself."""

    path: Path
    passport: Path
    threshold: float
    """Score from which objects are listed."""
    counts: dict[str, int]
    """Objects of each class."""
    areas_m2: dict[str, float]
    """Of the boxes of each class together."""
    seconds: float
    energy: EnergyReport
    impact: Impact
    """Of all starts of the run together."""
    area_km2: float


def detect(
    scene: Scene | str | Path,
    model: FineTuned | str | Path,
    out: str | Path,
    *,
    threshold: float | None = None,
    same: float = SAME,
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
) -> Detections:
    """Find objects all over a scene, in `box` or `aoi`, and write their boxes as GeoJSON (RFC 7946), the best first.

    Windows overlap by a quarter and their scores are blended before boxes are read off them, then boxes of a class
    that overlap by an IoU of `same` are taken for one, over the whole scene: so an object at an edge of windows or
    tiles is there once, and the size of tiles does not matter beyond rounding. Objects count from the score
    `threshold` on; by default from the one that was best in validation.

    `crs`, `on`, what becomes of a tile that cannot be made and of a stopped call: as in `embed`. In such a tile no
    objects are listed.
    """
    started, out = time.perf_counter(), Path(out)
    model = load_finetuned(model) if isinstance(model, str | Path) else model
    if model.task != "boxes":
        raise InputError(f"{model.name} answers with {model.task}, not with objects; use panterra map")
    if out.suffix.lower() not in (".geojson", ".json"):
        raise InputError(f"objects are written as GeoJSON; let the name {out.name!r} end in .geojson")
    threshold = threshold if threshold is not None else _known_threshold(model)
    if not 0 < threshold < 1 or not 0 < same <= 1:
        raise InputError(f"a threshold of {threshold:g} and an IoU of {same:g} came; wanted both between 0 and 1")
    scene = model.narrow(scene if isinstance(scene, Scene) else open_scene(scene))
    area = read_area(aoi) if aoi is not None else None
    encoder = Detector(model=model)
    work = Encoding.plan(
        scene,
        encoder,
        box=box,
        crs=crs,
        area=area,
        patch_m=model.setup.patch_m,
        modalities=model.modalities,
        window_px=model.setup.window_px,
        overlap_px=model.overlap_px,
        tile_px=tile_px,
        batch_windows=batch_windows,
        workers=workers,
    )
    check_on(on, work, budget_kwh)
    about = {**model.about(), "threshold": threshold, "same": same}
    parts = Parts(out, {**work.job, "detector": about}, overwrite=overwrite)
    sink = _List(parts=parts, work=work, detector=encoder, threshold=threshold, same=same)
    account = compute(
        "detect", work, parts, sink, on=on, country=country, budget_kwh=budget_kwh, progress=progress, note=note
    )
    asset = data_asset(out, pystac.MediaType.GEOJSON)
    listed = {"counts": sink.counts, "areas_m2": sink.areas_m2}
    told = {"panterra:detector": about, "panterra:objects": listed}
    conclude(work, parts, {"objects": asset}, account.total, told)
    made = Detections(
        path=out,
        passport=passport_of(out),
        threshold=threshold,
        counts=sink.counts,
        areas_m2=sink.areas_m2,
        seconds=time.perf_counter() - started,
        energy=account.energy,
        impact=impact_of(account.total),
        area_km2=work.area_km2,
    )
    return complete(made, work, parts, missing="list no objects")


@dataclass(slots=True, kw_only=True)
class _List:
    """Tiles into a GeoJSON of objects; the candidates of each are kept in the parts."""

    parts: Parts
    work: Encoding
    detector: Detector
    threshold: float
    same: float
    counts: dict[str, int] = field(default_factory=dict)
    areas_m2: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> _List:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write()

    def put(self, tile: Tile, features: np.ndarray) -> None:
        side = self.detector.side
        corner = tile.core.row * side, tile.core.col * side
        self.parts.save(tile, _candidates(features, side, self.detector.model.dim, self.threshold, corner))

    def again(self, tile: Tile) -> None:
        """Leave the candidates where they are."""

    def _write(self) -> None:
        """Read objects off the candidates of all tiles, each object once."""
        saved = [self.parts.load(tile) for tile in self.work.tiles() if tile.name not in self.parts.failed]
        found = {name: np.concatenate([some[name] for some in saved]) for name in ("row", "col", "scores")}
        boxes, score, kind = _objects(**found)
        kept = suppress(boxes, score, kind, same=self.same)
        grid = GeoBox((1, 1), self.work.grid.affine @ Affine.scale(1 / self.detector.side), self.work.grid.crs)
        names = [c.name for c in self.detector.model.classes]
        features, self.areas_m2 = _features(boxes[kept], score[kept], kind[kept], grid, names)
        self.counts = {name: int((kind[kept] == k).sum()) for k, name in enumerate(names)}
        text = json.dumps({"type": "FeatureCollection", "features": features}) + "\n"
        write_whole(self.parts.out, text, sync=True)


def _known_threshold(model: FineTuned) -> float:
    """Take the threshold that validation chose."""
    chosen = model.summary.get("validation", {}).get("threshold")
    return float(chosen) if chosen is not None else 0.5


def _candidates(
    patches: Float[np.ndarray, "h w d"], side: int, dim: int, threshold: float, corner: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Keep the cells of a tile in which a centre may be, by row and column of the whole scene."""
    cells = rearrange(patches, "h w (r c k) -> (h r) (w c) k", r=side, c=side, k=dim)
    # Places without data are NaN, which exceeds nothing.
    row, col = np.nonzero((cells[..., :-SHAPE] >= np.log(threshold / (1 - threshold))).any(-1))
    return {"row": row + corner[0], "col": col + corner[1], "scores": cells[row, col]}


def _objects(
    row: Int[np.ndarray, " n"], col: Int[np.ndarray, " n"], scores: Float[np.ndarray, "n k"]
) -> tuple[Float[np.ndarray, "m 4"], Float[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Read boxes (in cells of the whole scene), scores and classes off the peaks among candidates of all tiles."""
    order = np.lexsort((col, row))
    row, col, scores = row[order], col[order], scores[order]
    centres, peak = scores[:, :-SHAPE], _peaks(row, col, scores[:, :-SHAPE])
    which, kind = np.nonzero(peak)
    shape, at = torch.from_numpy(scores[which, -SHAPE:].T.astype(np.float64)), (row[which], col[which])
    boxes = boxes_of(shape, *(torch.from_numpy(n.astype(np.float64)) for n in at)).T.numpy()
    return boxes, 1 / (1 + np.exp(-centres[which, kind].astype(np.float64))), kind


def _peaks(
    row: Int[np.ndarray, " n"], col: Int[np.ndarray, " n"], centres: Float[np.ndarray, "n k"]
) -> Bool[np.ndarray, "n k"]:
    """Tell where no neighbouring cell has a higher score; what is no candidate is lower than all that are."""
    if not len(row):
        return np.zeros(centres.shape, np.bool_)
    width = int(col.max()) + 3
    place = row.astype(np.int64) * width + col + 1
    peak = np.ones(centres.shape, np.bool_)
    for step in (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1):
        near = np.searchsorted(place, place + step).clip(max=len(place) - 1)
        there = place[near] == place + step
        peak[there] &= centres[near[there]] <= centres[there]
    return peak


def _features(
    boxes: Float[np.ndarray, "n 4"],
    score: Float[np.ndarray, " n"],
    kind: Int[np.ndarray, " n"],
    grid: GeoBox,
    names: list[str],
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Describe boxes as GeoJSON, in longitude and latitude, and add up their areas by class."""
    to = grid.affine
    x = to.a * boxes[:, [0, 2, 2, 0]] + to.c
    y = to.e * boxes[:, [3, 3, 1, 1]] + to.f
    lon, lat = (np.round(n, 8).reshape(x.shape) for n in lonlat(grid.crs, x.ravel().tolist(), y.ravel().tolist()))
    metre = pixel_metres(grid)
    width, height = (boxes[:, 2] - boxes[:, 0]) * metre, (boxes[:, 3] - boxes[:, 1]) * metre
    features = []
    for n in range(len(boxes)):
        ring = [[float(a), float(b)] for a, b in zip(lon[n], lat[n], strict=True)]
        geometry: dict[str, Any] = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        if np.ptp(lon[n]) > 180:  # over the antimeridian it is cut in two
            own = Affine(x[n, 1] - x[n, 0], 0, x[n, 0], 0, y[n, 0] - y[n, 2], y[n, 2])
            geometry = footprint(GeoBox((1, 1), own, grid.crs))[0]
        told = {
            "class": names[kind[n]],
            "score": round(float(score[n]), 4),
            "width_m": round(float(width[n]), 2),
            "height_m": round(float(height[n]), 2),
        }
        features.append({"type": "Feature", "geometry": geometry, "properties": told})
    areas = {name: round(float((width * height)[kind == k].sum()), 2) for k, name in enumerate(names)}
    return features, areas
