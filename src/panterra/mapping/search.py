"""Places that look like others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from jaxtyping import Float, Float32, Int64
from odc.geo.geobox import GeoBox
from rasterio.windows import Window as FileWindow

from panterra.errors import InputError
from panterra.files import write_whole
from panterra.imagery.raster import CogWriter
from panterra.imagery.stac import pixel_metres
from panterra.mapping.embeddings import Block, ground_of, lonlat_of
from panterra.mapping.search_index import REFINED, Index, exact_products
from panterra.mapping.search_query import Examples, Query, Vectors
from panterra.mapping.search_scores import Best, directional_products

Progress = Callable[[int, int], None]
"""Called with how many patches are done and how many there are."""
Similarity = Callable[[Block, np.ndarray], None]
"""Called with every block and the scores of its patches."""

MOST_CANDIDATES = 2**21
"""Candidates held at once, 20 bytes each; where places keep further apart than these reach, a search takes passes."""
MOST_OFFERS = 2**14
"""Candidates that an index is asked for at first."""
SURELY = 0.998
"""Distances in a map projection are off by less than this (UTM: 0.9996 to 1.001)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best places, best first."""

    score: Float32[np.ndarray, " n"]
    source: Int64[np.ndarray, " n"]
    """Which of the stores shows it."""
    row: Int64[np.ndarray, " n"]
    col: Int64[np.ndarray, " n"]
    lonlat: Float[np.ndarray, "n 2"]

    def __len__(self) -> int:
        return len(self.score)

    def columns(self) -> tuple[np.ndarray, ...]:
        """Return the fields in order."""
        return self.score, self.source, self.row, self.col, self.lonlat

    def take(self, which: np.ndarray) -> Found:
        """Choose and reorder."""
        score, source, row, col, lonlat = (column[which] for column in self.columns())
        return Found(score=score, source=source, row=row, col=col, lonlat=lonlat)


def search(
    stores: Sequence[Vectors],
    query: Query,
    *,
    top: int = 100,
    apart_m: float = 200.0,
    leave_out: Examples | None = None,
    indexes: Sequence[Index] = (),
    similarity: Similarity | None = None,
    progress: Progress | None = None,
) -> Found:
    """Find the `top` places that score best and lie `apart_m` or more from all better ones.

    Exact: all patches of all stores are compared, in bounded memory. With `indexes`, one for each store, only those
    that the indexes offer, whose scores are exact nevertheless. The surroundings of `leave_out` are passed over.
    `similarity` is handed the score of every patch.
    """
    if top < 1 or apart_m < 0:
        raise InputError(f"{top} places {apart_m:g} m apart were asked for; wanted 1 or more, 0 m or more apart")
    pitch = min(pixel_metres(store.box) for store in stores)
    # A place can stand in the way of all within its disc, in each store.
    disc = math.ceil(math.pi * (apart_m / pitch + 1) ** 2) * len(stores) if apart_m else 1
    most = max(min(top * disc, MOST_CANDIDATES), top)
    away = [Away(lonlat=leave_out.lonlat, metres=max(apart_m, pitch / 2))] if leave_out is not None else []
    found: Found | None = None
    widening = 1
    while True:
        if indexes:
            best = _offers(stores, query, indexes, most, widening, REFINED * top, away)
        else:
            best = _scan(stores, query, Best(most), away, similarity, progress)
        before = 0 if found is None else len(found)
        found = _spread(found, _found(*best.sorted(), stores), apart_m, top)
        if len(found) >= top or not best.full or (len(found) == before and not indexes):
            break
        # What stands in the way of the rest is known now; the next pass looks past it.
        away = [*away[: leave_out is not None], Away(lonlat=found.lonlat, metres=max(SURELY * apart_m, pitch / 2))]
        similarity, widening = None, widening * 4
    if indexes:
        found = _exact(found, stores, query)
    return replace(found, score=query.values(found.score))


def earth_xyz(lonlat: np.ndarray) -> np.ndarray:
    """Return metres from the centre of the Earth [n, 3], in which near distances are those on the ground."""
    geocentric = pyproj.Transformer.from_crs("EPSG:4979", "EPSG:4978", always_xy=True)
    return np.stack(geocentric.transform(lonlat[:, 0], lonlat[:, 1], np.zeros(len(lonlat))), axis=1)


def spread(xyz: Float[np.ndarray, "n 3"], apart_m: float, most: int) -> Int64[np.ndarray, " k"]:
    """Keep the first places that are `apart_m` or more from every one kept before; return their numbers."""
    if apart_m <= 0:
        return np.arange(min(most, len(xyz)))
    kept: list[int] = []
    left = np.arange(len(xyz))
    while len(left) and len(kept) < most:
        kept.append(int(left[0]))
        far = np.square(xyz - xyz[0]).sum(1) >= apart_m**2
        left, xyz = left[far], xyz[far]
    return np.array(kept, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Away:
    """Places whose surroundings are left out of a search."""

    lonlat: np.ndarray
    metres: float

    def tree(self, box: GeoBox) -> tuple[shapely.STRtree, float]:
        """Return the places and the distance in the coordinates of a grid."""
        assert box.crs is not None
        to = pyproj.Transformer.from_crs("EPSG:4326", box.crs.to_wkt(), always_xy=True)
        x, y = to.transform(self.lonlat[:, 0], self.lonlat[:, 1])
        inside = np.isfinite(x) & np.isfinite(y)
        unit = abs(box.affine.a) / pixel_metres(box)
        return shapely.STRtree(shapely.points(np.asarray(x)[inside], np.asarray(y)[inside])), self.metres * unit


def _scan(
    stores: Sequence[Vectors],
    query: Query,
    best: Best,
    away: Sequence[Away],
    similarity: Similarity | None,
    progress: Progress | None,
) -> Best:
    """Compare the query with all patches."""
    done, total = 0, sum(math.prod(store.box.shape) for store in stores)
    for number, store in enumerate(stores):
        trees = [places.tree(store.box) for places in away]
        for block in store.blocks():
            products = directional_products(query.weight[None], block.codes)[0]
            if similarity:
                similarity(block, query.values(products))
            hopeful = best.promising(products)
            best.add(*_far(products[hopeful], number, block.cells[hopeful], trees, store.box))
            done += len(block.cells)
            if progress:
                progress(done, total)
    return best


def _offers(
    stores: Sequence[Vectors],
    query: Query,
    indexes: Sequence[Index],
    most: int,
    widening: int,
    refined: int,
    away: Sequence[Away],
) -> Best:
    """Ask indexes for candidates; each pass asks for more and looks further."""
    count = min(most, MOST_OFFERS) * widening
    best = Best(max(most, count * len(stores)))
    for number, (store, index) in enumerate(zip(stores, indexes, strict=True)):
        cells, products = index.nearest(query.weight, count, probes=index.probes * widening)
        products[:refined] = exact_products(store, query.weight, cells[:refined])
        best.add(*_far(products, number, cells, [places.tree(store.box) for places in away], store.box))
        best.full |= len(cells) == count or index.probes * widening < index.lists
    return best


def _far(
    products: np.ndarray, source: int, cells: np.ndarray, trees: Sequence[tuple[shapely.STRtree, float]], box: GeoBox
) -> tuple[np.ndarray, int, np.ndarray]:
    """Drop the candidates near places that are left out."""
    if trees and len(cells):
        row, col = np.divmod(cells, box.shape[1])
        points = shapely.points(*ground_of(row + 0.5, col + 0.5, box))
        near = np.zeros(len(cells), np.bool_)
        for tree, distance in trees:
            near[tree.query(points, predicate="dwithin", distance=distance)[0]] = True
        products, cells = products[~near], cells[~near]
    return products, source, cells


def _found(score: np.ndarray, source: np.ndarray, cells: np.ndarray, stores: Sequence[Vectors]) -> Found:
    row, col, lonlat = np.empty_like(cells), np.empty_like(cells), np.empty((len(cells), 2))
    for number, store in enumerate(stores):
        own = source == number
        row[own], col[own] = np.divmod(cells[own], store.box.shape[1])
        lonlat[own] = lonlat_of(row[own], col[own], store.box)
    return Found(score=score, source=source, row=row, col=col, lonlat=lonlat)


def _spread(before: Found | None, more: Found, apart_m: float, top: int) -> Found:
    """Add candidates to what was found before, those that keep their distance."""
    if before is not None:
        both = zip(before.columns(), more.columns(), strict=True)
        more = Found(**{name: np.concatenate([a, b]) for name, (a, b) in zip(Found.__slots__, both, strict=True)})
    return more.take(spread(earth_xyz(more.lonlat), apart_m, top))


def _exact(found: Found, stores: Sequence[Vectors], query: Query) -> Found:
    """Replace an index's approximate products by exact ones."""
    score = found.score.copy()
    for number, store in enumerate(stores):
        own = found.source == number
        cells = found.row[own] * store.box.shape[1] + found.col[own]
        score[own] = exact_products(store, query.weight, cells)
    return replace(found, score=score).take(np.argsort(-score, kind="stable"))


@contextmanager
def similarity_map(path: Path, box: GeoBox) -> Iterator[Similarity]:
    """Write the score of every patch of one store as a cloud-optimised GeoTIFF, while the block runs."""
    with CogWriter(path, box, 1, "float32", nodata=math.nan, band_names=("similarity",)) as writer:

        def write(block: Block, values: np.ndarray) -> None:
            rows, cols = np.divmod(block.cells, box.shape[1])
            top, left = int(rows.min()), int(cols.min())
            pixels = np.full((int(rows.max()) - top + 1, int(cols.max()) - left + 1), np.nan, np.float32)
            pixels[rows - top, cols - left] = values
            writer.write(FileWindow(left, top, pixels.shape[1], pixels.shape[0]), pixels)

        yield write


def write_found(path: Path, found: Found, stores: Sequence[Vectors], about: Mapping[str, Any]) -> None:
    """Write what was found as GeoJSON: points at the centres of patches, best first; `about` says how."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [round(float(lon), 7), round(float(lat), 7)]},
            "properties": {
                "rank": rank,
                "score": round(float(score), 6),
                "store": stores[source].path.name,
                "row": int(row),
                "col": int(col),
                **_period(stores[source]),
            },
        }
        for rank, (score, source, row, col, (lon, lat)) in enumerate(zip(*found.columns(), strict=True), start=1)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"type": "FeatureCollection", "panterra:search": about, "features": features}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _period(store: Vectors) -> dict[str, str]:
    return {"start": str(store.dates[0]), "end": str(store.dates[-1])} if store.dates else {}
