"""What changed between two embeddings of the same ground."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import geopandas as gpd
import numpy as np
import pystac
import rasterio
import rasterio.features
import shapely
from jaxtyping import Float32
from odc.geo.geobox import GeoBox
from rasterio.windows import from_bounds

from panterra.energy import measure_energy
from panterra.errors import InputError
from panterra.files import write_whole
from panterra.imagery.grids import unwrapped
from panterra.imagery.labels import Labels, sample_labels
from panterra.imagery.raster import CogWriter
from panterra.imagery.stac import pixel_metres
from panterra.mapping.embeddings import EmbeddingStore, file_window, is_tif
from panterra.mapping.passport import data_asset, passport_of, write_passport
from panterra.mapping.search_query import check_comparable
from panterra.mapping.search_scores import STEP, expand

Progress = Callable[[int, int], None]

STABLE, CHANGED, NO_DATA = 0, 1, 255
CATEGORIES = {STABLE: "stable", CHANGED: "changed"}
PALETTE = {STABLE: (222, 222, 214), CHANGED: (196, 40, 80)}

SMALLEST = 1e-7
"""Cosine distances below this are rounding."""
LOG_EDGES = np.linspace(math.log(SMALLEST), math.log(2.0), 8193)
"""The bins in which distances are counted: a fifth of a percent wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What `find_change` wrote."""

    distance: Path
    mask: Path
    polygons: Path | None
    passport: Path
    threshold: float
    """Cosine distance from which a patch counts as changed."""
    rule: str
    """Where the threshold comes from."""
    share: float
    """Of the patches with data in both, those that changed."""
    num_polygons: int


def find_change(
    before: EmbeddingStore,
    after: EmbeddingStore,
    out: str | Path,
    *,
    threshold: float | None = None,
    false_alarms: float = 0.001,
    stable: gpd.GeoSeries | None = None,
    polygons: Path | None = None,
    min_patches: int = 1,
    country: str | None = None,
    progress: Progress | None = None,
) -> Change:
    """Write the cosine distance of each patch to itself at another time, and where it is more than chance.

    `out` holds the distances (0: same direction, 1: nothing in common), `<out>_mask.tif` what changed, `polygons`
    GeoJSON of connected patches, of `min_patches` or more. The threshold is given, or the distance that a share of
    `false_alarms` of the stable places exceeds. Of `stable` places, where given, it is an order statistic of their
    distances, exact for places like them. Otherwise the bulk of all patches stands for them, see `bulk_threshold`.
    """
    out = Path(out)
    if not is_tif(out):
        raise InputError(f"distances are written as a GeoTIFF; let the name {out.name!r} end in .tif")
    if not 0 < false_alarms < 0.5:
        raise InputError(f"a share of {false_alarms:g} false alarms was asked for; wanted more than 0, less than 0.5")
    if threshold is not None and not 0 < threshold < 2:
        raise InputError(f"a threshold of {threshold:g} was given; cosine distances lie between 0 and 2")
    check_same_ground(before, after)
    mask = out.with_name(f"{out.stem}_mask.tif")
    with measure_energy(country=country) as meter:
        counts = _write_distances(before, after, out, progress)
        if not counts.sum():
            raise InputError(f"{before.path} and {after.path} have no patch with data in common")
        if threshold is not None:
            rule = "given"
        elif stable is not None:
            distances = _distances_at(stable, before, after)
            threshold, rule = stable_threshold(distances, false_alarms), f"{len(distances)} patches of stable places"
        else:
            threshold, rule = bulk_threshold(counts, false_alarms), "bulk of all patches"
        tags = {"threshold": f"{threshold:.6g}", "rule": rule, "false_alarms": f"{false_alarms:g}"}
        changed = _write_mask(out, mask, before.box, threshold, tags)
        num_polygons = _write_polygons(out, mask, before.box, polygons, min_patches) if polygons is not None else 0
    assets = {
        "distance": data_asset(out, data_type="float32", nodata="nan"),
        "mask": data_asset(mask, data_type="uint8", nodata=NO_DATA, **_classes()),
        **({"polygons": data_asset(polygons, pystac.MediaType.GEOJSON)} if polygons is not None else {}),
    }
    passport = passport_of(out)
    share = changed / int(counts.sum())
    write_passport(
        passport,
        before.box,
        sorted({*before.dates, *after.dates}),
        assets,
        energy=meter.report,
        licence=before.about.get("licence"),
        properties={
            "panterra:inputs": [{"id": s.path.name, "files": [str(s.path.absolute())]} for s in (before, after)],
            "panterra:model": before.about.get("model"),
            "panterra:change": {**tags, "share": round(share, 6)},
        },
    )
    return Change(
        distance=out,
        mask=mask,
        polygons=polygons,
        passport=passport,
        threshold=threshold,
        rule=rule,
        share=share,
        num_polygons=num_polygons,
    )


def check_same_ground(before: EmbeddingStore, after: EmbeddingStore) -> None:
    """Refuse stores whose patches are not the same places, or whose vectors mean different things."""
    check_comparable(before, after)
    one, other = before.box, after.box
    if one.shape != other.shape or one.crs != other.crs or not one.affine.almost_equals(other.affine, 1e-6):
        raise InputError(
            f"{before.path} lies on {_describe(before.box)}, {after.path} on {_describe(after.box)}; change needs the "
            "same grid: embed both scenes over the same area with the same patch size"
        )


def bulk_threshold(counts: np.ndarray, false_alarms: float) -> float:
    """Return the distance that a share of the stable patches exceeds, from counts in the bins of `LOG_EDGES`.

    Between unit vectors that differ by noise, the distance is a sum of squares, whose cube root is about normal (Wilson
    and Hilferty 1931). Its median and spread, median - 16th percentile, are those of the lower half of all distances,
    as change only adds to the upper half. What lies above the threshold is then set aside and the threshold found anew,
    until it settles; at most half is set aside. Ground of which some kinds vary far more than others breaks the
    assumption; there, known stable places tell more.
    """
    normal, total = NormalDist(), np.concatenate([[0], np.cumsum(counts)])
    aside, limit = 0.0, LOG_EDGES[-1]
    for _ in range(20):
        shares = np.array([0.5, normal.cdf(-1)]) * (1 - aside)
        median, low = np.exp(np.interp(shares * total[-1], total, LOG_EDGES) / 3)
        limit = min(3 * math.log(median + normal.inv_cdf(1 - false_alarms) * (median - low)), LOG_EDGES[-1])
        above = 1 - np.interp(limit, LOG_EDGES, total) / total[-1]
        # Of the stable ones, as many as are allowed lie above as well.
        aside = min(max((above - false_alarms) / (1 - false_alarms), 0.0), 0.5)
    return math.exp(limit)


def stable_threshold(distances: np.ndarray, false_alarms: float) -> float:
    """Return the distance that another stable place exceeds with at most this probability: an order statistic."""
    rank = math.ceil((len(distances) + 1) * (1 - false_alarms))
    if rank > len(distances):
        raise InputError(
            f"{len(distances)} patches of stable places cannot tell a share of {false_alarms:g} false alarms; give "
            f"{math.ceil(1 / false_alarms) - 1} or more, or allow a larger share"
        )
    return float(np.sort(distances)[rank - 1])


def cosine_distances(one: np.ndarray, other: np.ndarray) -> Float32[np.ndarray, " n"]:
    """Return the cosine distances of stored vectors [D, n]; NaN where either has no data."""
    distances = np.empty(one.shape[1], np.float32)
    for first in range(0, one.shape[1], STEP):
        u, v = (expand(codes[:, first : first + STEP]) for codes in (one, other))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            # Half the squared difference of unit vectors keeps its digits where 1 - cosine loses them.
            difference = u / np.linalg.norm(u, axis=0) - v / np.linalg.norm(v, axis=0)
            distances[first : first + STEP] = np.square(difference).sum(0) / 2
    return distances


def _write_distances(before: EmbeddingStore, after: EmbeddingStore, out: Path, progress: Progress | None) -> np.ndarray:
    """Write the distances and count them in the bins of `LOG_EDGES`."""
    counts, windows = np.zeros(len(LOG_EDGES) - 1, np.int64), before.windows()
    with CogWriter(out, before.box, 1, "float32", nodata=math.nan, band_names=("cosine distance",)) as writer:
        for number, window in enumerate(windows, start=1):
            one, other = (store.stored(window)[0].reshape(store.dim, -1) for store in (before, after))
            distances = cosine_distances(one, other)
            seen = np.clip(distances[np.isfinite(distances)], SMALLEST, 2.0)
            counts += np.histogram(np.log(seen, dtype=np.float64).clip(LOG_EDGES[0], LOG_EDGES[-1]), LOG_EDGES)[0]
            writer.write(file_window(window), distances.reshape(window.height, window.width))
            if progress:
                progress(number, len(windows))
    return counts


def _write_mask(distance: Path, mask: Path, box: GeoBox, threshold: float, tags: dict[str, str]) -> int:
    """Write which patches changed and count them."""
    changed = 0
    with (
        rasterio.open(distance) as source,
        CogWriter(mask, box, 1, "uint8", nodata=NO_DATA, palette=PALETTE, categories=CATEGORIES, tags=tags) as writer,
    ):
        for _, window in source.block_windows(1):
            values = source.read(1, window=window)
            pixels = np.where(np.isfinite(values), np.where(values >= threshold, CHANGED, STABLE), NO_DATA)
            changed += int((pixels == CHANGED).sum())
            writer.write(window, pixels.astype(np.uint8))
    return changed


def _write_polygons(distance: Path, mask: Path, box: GeoBox, out: Path, min_patches: int) -> int:
    """Write connected changed patches as GeoJSON, largest first; the mask, a byte per patch, is held in memory."""
    with rasterio.open(mask) as file:
        pixels, transform, crs = file.read(1), file.transform, file.crs
    shapes = rasterio.features.shapes(pixels, mask=pixels == CHANGED, connectivity=8, transform=transform)
    cell = abs(transform.determinant)
    grown = [shapely.geometry.shape(geometry) for geometry, _ in shapes]
    grown = sorted((g for g in grown if round(g.area / cell) >= min_patches), key=lambda g: -g.area)
    with rasterio.open(distance) as file:
        figures = [_figures(file, polygon) for polygon in grown]
    hectares = pixel_metres(box) ** 2 / 1e4
    frame = gpd.GeoDataFrame(
        {
            "hectares": [round(g.area / cell * hectares, 4) for g in grown],
            "patches": [round(g.area / cell) for g in grown],
            "mean_distance": [round(mean, 5) for mean, _ in figures],
            "max_distance": [round(most, 5) for _, most in figures],
        },
        geometry=gpd.GeoSeries(grown, crs=crs.to_wkt()),
    ).to_crs("EPSG:4326")
    # Patches that touch at corners alone make rings that touch themselves, and RFC 7946 has rules of its own.
    frame.geometry = [shapely.orient_polygons(unwrapped(shapely.make_valid(shape))) for shape in frame.geometry]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(json.loads(frame.to_json(drop_id=True)), indent=1) + "\n")
    return len(grown)


def _figures(file: Any, polygon: Any) -> tuple[float, float]:
    """Return the mean and the largest distance of the patches of a polygon."""
    window = from_bounds(*polygon.bounds, file.transform).round_offsets().round_lengths()
    values = file.read(1, window=window)
    inside = rasterio.features.geometry_mask([polygon], values.shape, file.window_transform(window), invert=True)
    return float(values[inside].mean()), float(values[inside].max())


def _distances_at(stable: gpd.GeoSeries, before: EmbeddingStore, after: EmbeddingStore) -> np.ndarray:
    frame = gpd.GeoDataFrame({"target": np.zeros(len(stable))}, geometry=stable.array, crs=stable.crs)
    cells = sample_labels(Labels(frame=frame, kind="values"), before.box)
    distances = cosine_distances(*(store.sample(cells.row, cells.col).T for store in (before, after)))
    known: np.ndarray = distances[np.isfinite(distances)]
    return known


def _describe(box: GeoBox) -> str:
    height, width = box.shape
    return (
        f"{height} x {width} patches of {pixel_metres(box):g} m from {box.affine.c:g} {box.affine.f:g} in "
        f"EPSG:{box.crs.epsg if box.crs else None}"
    )


def _classes() -> dict[str, Any]:
    classes = [
        {"value": code, "name": name, "color_hint": "{:02X}{:02X}{:02X}".format(*PALETTE[code])}
        for code, name in CATEGORIES.items()
    ]
    return {"classification:classes": classes}
