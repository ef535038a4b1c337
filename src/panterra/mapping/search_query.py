"""What a search looks for."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import geopandas as gpd
import numpy as np
import pyogrio
import shapely
from jaxtyping import Float, Float32
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.imagery.labels import Labels, sample_labels
from panterra.mapping.chips import is_chips, open_chips
from panterra.mapping.embeddings import Block, lonlat_of, open_embeddings

Method = Literal["cosine", "logistic"]
Polygons = Literal["mean", "all"]

BACKGROUND = 500
"""Random patches that stand for everything else where a logistic query has no counter-examples."""
PENALTY = 1e-3
"""Weight of the squared length of a logistic query against its mean log loss; examples have length 1."""


class Vectors(Protocol):
    """What can be searched: an `EmbeddingStore` or `Chips`."""

    @property
    def path(self) -> Path: ...
    @property
    def box(self) -> GeoBox: ...
    @property
    def dim(self) -> int: ...
    @property
    def about(self) -> Mapping[str, Any]: ...
    @property
    def dates(self) -> list[dt.date]: ...

    def sample(self, row: np.ndarray, col: np.ndarray) -> np.ndarray: ...
    def blocks(self, first: int = 0) -> Iterator[Block]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Vectors of places that a person pointed at."""

    vectors: Float32[np.ndarray, "n d"]
    """Of length 1."""
    lonlat: Float[np.ndarray, "m 2"]
    """Centres of all patches that they come from."""
    unseen: int = 0
    """Places that no store shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is looked for: a patch of direction u scores `weight @ u + bias`, a logistic query the sigmoid of that."""

    weight: Float32[np.ndarray, " d"]
    bias: float = 0.0
    method: Method = "cosine"

    def values(self, products: np.ndarray) -> np.ndarray:
        """Turn `weight @ u` into what people see: cosines, or probabilities."""
        shifted = products.astype(np.float64) + self.bias
        values: np.ndarray = shifted if self.method == "cosine" else 1 / (1 + np.exp(-shifted))
        return values.astype(np.float32)


def open_vectors(path: str | Path) -> Vectors:
    """Open what can be searched: a Zarr store or GeoTIFF of `panterra embed`, or a GeoParquet file of chips."""
    return open_chips(path) if is_chips(path) else open_embeddings(path)


def open_together(paths: Sequence[str | Path]) -> list[Vectors]:
    """Open several stores to be searched as one; their vectors must come from one model, at one width."""
    if not paths:
        raise InputError("no store was given to search; name one that `panterra embed` wrote")
    stores = [open_vectors(path) for path in paths]
    for other in stores[1:]:
        check_comparable(stores[0], other)
    return stores


def check_comparable(one: Vectors, other: Vectors) -> None:
    """Refuse vectors that mean different things."""
    for what, of in (
        ("width", lambda v: v.dim),
        ("model", lambda v: (v.about.get("model") or {}).get("name")),
        ("model's weights", lambda v: (v.about.get("model") or {}).get("weights_sha256")),
        ("modalities", lambda v: sorted(v.about.get("modalities") or ())),
    ):
        if of(one) != of(other):
            raise InputError(
                f"{one.path} and {other.path} differ in {what} ({of(one)} and {of(other)}), so their vectors cannot be "
                "compared; embed both in the same way"
            )


def read_places(path: str | Path) -> gpd.GeoSeries:
    """Read points or polygons of anything GDAL reads, or GeoParquet."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; wanted points or polygons, such as GeoJSON")
    try:
        frame = gpd.read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else gpd.read_file(path)
    except (pyogrio.errors.DataSourceError, ValueError) as error:
        raise InputError(f"cannot read places from {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(frame, gpd.GeoDataFrame) or frame.crs is None:
        raise InputError(f"{path} does not say where its places are; wanted geometries with a reference system")
    places = frame.geometry[frame.geometry.notna() & ~frame.geometry.is_empty]
    odd = set(places.geom_type) - {"Point", "MultiPoint", "Polygon", "MultiPolygon"}
    if odd or places.empty:
        raise InputError(f"{path} holds {', '.join(sorted(odd)) or 'no geometry'}; wanted points or polygons")
    return places.reset_index(drop=True)


def place_at(lon: float, lat: float) -> gpd.GeoSeries:
    """Make a place of a longitude and a latitude."""
    if not (-180 <= lon <= 180 and -90 <= lat <= 90):
        raise InputError(f"{lon:g} {lat:g} is no longitude and latitude; give degrees, longitude first")
    return gpd.GeoSeries([shapely.Point(lon, lat)], crs="EPSG:4326")


def gather_examples(places: gpd.GeoSeries, stores: Sequence[Vectors], *, polygons: Polygons = "mean") -> Examples:
    """Take the vectors of places, each from the first store that shows it.

    A polygon gives the mean direction of the patches whose centres it holds, or with "all" each of them; one that
    holds no centre gives the patch under it. Raises InputError where no place is on a patch with data.
    """
    vectors: list[np.ndarray] = []
    lonlat: list[np.ndarray] = []
    missing = np.arange(len(places))
    for store in stores:
        if not len(missing):
            break
        group, units, where = _vectors_of(places.iloc[missing], store)
        for number in np.unique(group):
            own = units[group == number]
            vectors.append(_units(own.mean(0, keepdims=True)) if polygons == "mean" else own)
        lonlat.append(where)
        missing = np.delete(missing, np.unique(group))
    if len(missing) == len(places):
        raise InputError(
            f"none of the {len(places)} example places lies on a patch with data in "
            f"{', '.join(str(s.path) for s in stores)}; check that both show the same area"
        )
    return Examples(vectors=np.concatenate(vectors), lonlat=np.concatenate(lonlat), unseen=len(missing))


def _vectors_of(places: gpd.GeoSeries, store: Vectors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of the place, the direction, and longitude and latitude of each patch under places."""
    frame = gpd.GeoDataFrame({"target": np.zeros(len(places))}, geometry=places.array, crs=places.crs)
    cells = sample_labels(Labels(frame=frame, kind="values"), store.box)
    without = np.setdiff1d(np.arange(len(places)), cells.group)
    inner = gpd.GeoDataFrame(
        {"target": np.zeros(len(without))}, geometry=frame.geometry.iloc[without].representative_point().array
    ).set_crs(places.crs)
    under = sample_labels(Labels(frame=inner, kind="values"), store.box)
    row, col = np.concatenate([cells.row, under.row]), np.concatenate([cells.col, under.col])
    group = np.concatenate([cells.group, without[under.group]])
    units = _units(store.sample(row, col))
    seen = np.isfinite(units).all(1)
    return group[seen], units[seen], lonlat_of(row[seen], col[seen], store.box)


def _units(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1; NaN where there is none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        units: np.ndarray = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return units


def make_query(
    like: Examples,
    unlike: Examples | None = None,
    *,
    method: Method = "cosine",
    unlike_weight: float = 1.0,
    background: Sequence[Vectors] = (),
) -> Query:
    """Turn examples into a query.

    "cosine": the mean of the examples less `unlike_weight` times the mean of the counter-examples, brought to length
    1 (Rocchio 1971, whose usual weights 0.75 and 0.15 are an `unlike_weight` of 0.2). "logistic": a logistic
    regression of length-1 vectors, both sides weighing the same; without counter-examples against random patches of
    `background`.
    """
    if method == "cosine":
        weight = like.vectors.mean(0) - (unlike_weight * unlike.vectors.mean(0) if unlike is not None else 0)
        length = float(np.linalg.norm(weight))
        if length < 1e-4:
            raise InputError("what is wanted looks the same as what is not, so nothing is left to look for; use others")
        return Query(weight=(weight / length).astype(np.float32))
    against = unlike.vectors if unlike is not None else _random_vectors(background)
    weight, bias = _logistic(like.vectors, against)
    return Query(weight=weight, bias=bias, method="logistic")


def _random_vectors(stores: Sequence[Vectors]) -> np.ndarray:
    rng = np.random.default_rng(0)
    sizes = np.array([math.prod(store.box.shape) for store in stores])
    counts = np.bincount(rng.choice(len(stores), BACKGROUND, p=sizes / sizes.sum()), minlength=len(stores))
    parts = []
    for store, count in zip(stores, counts, strict=True):
        row, col = (rng.integers(0, side, count) for side in store.box.shape)
        parts.append(_units(store.sample(row, col)))
    vectors = np.concatenate(parts)
    known: np.ndarray = vectors[np.isfinite(vectors).all(1)]
    if not len(known):
        raise InputError("no random patch of the stores has data; give counter-examples with --unlike")
    return known


def _logistic(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit a logistic regression by Newton's method, with both sides of the same weight."""
    x = np.concatenate([positives, negatives]).astype(np.float64)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    sides = (len(positives), len(negatives))
    y, share = np.repeat([1.0, 0.0], sides), np.repeat([0.5 / n for n in sides], sides)
    penalty = np.full(x.shape[1], 2 * PENALTY)
    penalty[-1] = 0

    def loss(theta: np.ndarray) -> float:
        logits = x @ theta
        return float(share @ (np.logaddexp(0, logits) - y * logits) + penalty @ theta**2 / 2)

    theta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-(x @ theta)))
        gradient = x.T @ (share * (p - y)) + penalty * theta
        step = np.linalg.solve((x * (share * p * (1 - p))[:, None]).T @ x + np.diag(penalty), gradient)
        while loss(theta - step) > loss(theta) and np.abs(step).max() > 1e-12:
            step = step / 2
        theta = theta - step
        if np.abs(step).max() < 1e-9:
            break
    return theta[:-1].astype(np.float32), float(theta[-1])
