"""Objects all over a scene, each once."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
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
from panterra.errors import InputError
from panterra.finetune.boxes import SAME, SHAPE, boxes_of, suppress
from panterra.finetune.model import FineTuned, load_finetuned
from panterra.imagery.grids import footprint, lonlat
from panterra.imagery.stac import Scene, open_scene, pixel_metres
from panterra.mapping.areas import read_area
from panterra.mapping.effort import accounted
from panterra.mapping.parts import Failure, Parts
from panterra.mapping.passport import write_passport
from panterra.mapping.run import Note, Progress, common_grid, counting
from panterra.mapping.sources import Encoding
from panterra.models.features import Features
from panterra.sample import Batch


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Patches:
    """A detector as an encoder of patches: a patch's vector holds the scores of its cells.

    So cells may be finer than the common grid, and scores are blended where windows overlap, as features are.
    """

    model: FineTuned

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.model.modalities

    @property
    def side(self) -> int:
        return self.model.setup.head.side

    @property
    def dim(self) -> int:
        return self.model.dim * self.side**2

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        assert patch_m == self.model.setup.patch_m, patch_m
        device = next(self.model.parameters()).device
        cells = self.model.encode(batch.to(device), patch_m=self.model.setup.output_m)
        patches = rearrange(cells.patches, "b (h r) (w c) k -> b h w (r c k)", r=self.side, c=self.side)
        valid = cells.valid[:, :: self.side, :: self.side]
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=patch_m)


def detect(
    scene: Scene | str | Path,
    model: FineTuned | str | Path,
    out: str | Path,
    *,
    threshold: float | None = None,
    same: float = SAME,
    box: GeoBox | None = None,
    aoi: str | Path | None = None,
    tile_px: int | None = None,
    batch_windows: int = 8,
    workers: int = 1,
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

    Finished tiles lie in `<out>.parts`: after any interruption the same call goes on from there.
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
    encoder = _Patches(model=model)
    work = Encoding.plan(
        scene,
        encoder,
        box=box if box is not None else common_grid(scene, encoder, model.modalities, area=area),
        area=area,
        patch_m=model.setup.patch_m,
        modalities=model.modalities,
        window_px=model.setup.window_px,
        overlap_px=model.overlap_px,
        tile_px=tile_px,
        batch_windows=batch_windows,
        workers=workers,
    )
    about = {**model.about(), "threshold": threshold, "same": same}
    parts = Parts(out, {**work.job, "detector": about}, overwrite=overwrite)
    advance = counting(work, progress)
    with (
        accounted("detect", work, parts, country=country, budget_kwh=budget_kwh, note=note) as account,
        parts.guard(),
    ):
        advance(sum(work.cost(tile) for tile in work.tiles() if parts.has(tile)))
        todo = (tile for tile in work.tiles() if not parts.has(tile))
        for tile, patches in work.features(todo, parts, advance):
            if isinstance(patches, Failure):
                raise InputError(
                    f"stopped, as tile {tile.name} could not be made: {patches.reason}; finished tiles are kept in "
                    f"{parts.folder}, and the same job goes on from there when this is put right"
                )
            corner = tile.core.row * encoder.side, tile.core.col * encoder.side
            parts.save(tile, _candidates(patches, encoder.side, model.dim, threshold, corner))
            account.finish(tile)
        saved = [parts.load(tile) for tile in work.tiles()]
        found = {name: np.concatenate([some[name] for some in saved]) for name in ("row", "col", "scores")}
        boxes, score, kind = _objects(**found)
        kept = suppress(boxes, score, kind, same=same)
        grid = GeoBox((1, 1), work.grid.affine @ Affine.scale(1 / encoder.side), work.grid.crs)
        names = [c.name for c in model.classes]
        features, areas = _features(boxes[kept], score[kept], kind[kept], grid, names)
        _write(out, features)
    counts = {name: int((kind[kept] == k).sum()) for k, name in enumerate(names)}
    passport = out.with_name(f"{out.name}.json")
    with parts.guard():
        write_passport(
            passport,
            work.grid,
            work.dates,
            {"objects": pystac.Asset(str(out.absolute()), media_type=pystac.MediaType.GEOJSON, roles=["data"])},
            energy=account.total,
            area_km2=work.area_km2,
            licence=work.licence,
            properties={
                "panterra:detector": about,
                "panterra:objects": {"counts": counts, "areas_m2": areas},
                **work.origin,
                "panterra:encoder_seconds": round(work.encoder_seconds, 3),
            },
        )
        parts.remove()
    return Detections(
        path=out,
        passport=passport,
        threshold=threshold,
        counts=counts,
        areas_m2=areas,
        seconds=time.perf_counter() - started,
        energy=account.energy,
        impact=impact_of(account.total),
        area_km2=work.area_km2,
    )


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


def _write(out: Path, features: list[dict[str, Any]]) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}) + "\n", encoding="utf-8")
    temporary.replace(out)
