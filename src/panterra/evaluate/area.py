"""How much of each class there is, and how far a map of it is right, from reference points.

The estimators are design-based: they hold whatever the map is like, because the points were drawn at random. Where the
strata are the map's classes they are those of Olofsson et al. (2014, https://doi.org/10.1016/j.rse.2014.02.015), where
they are not, those of Stehman (2014, https://doi.org/10.1080/01431161.2014.930207), of which the first are a case.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from odc.geo.geobox import GeoBox
from pyproj import CRS, Transformer
from rasterio.windows import Window

from panterra.errors import InputError
from panterra.imagery.raster import dtype_of, grid_of, read_legend, read_onto
from panterra.plain import as_plain

IntervalKind = Literal["wilson", "normal"]

BLOCK_PX = 1024
"""Side of the part of a map that is read at a time."""
MAX_CLASSES = 4096
_NODE_PX = 16
"""Pixels between the places where the size of a pixel is worked out; it is interpolated between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure, its standard error over repeated samples, and a confidence interval; NaN where undefined."""

    value: float
    standard_error: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """Express the figure in another unit."""
        return Estimate(**{name: figure * factor for name, figure in asdict(self).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAccuracy:
    """What the points say of one class."""

    code: int
    mapped_points: int
    reference_points: int
    users: Estimate
    """Share of what is mapped as the class that is it: one minus commission."""
    producers: Estimate
    """Share of the class that is mapped as such: one minus omission."""
    area_share: Estimate
    """Of the whole region, by the reference: the error-adjusted area."""
    mapped_share: float
    """Of the whole region, by the map, estimated from the points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AreaReport:
    """Accuracy of a map and area of its classes."""

    num_points: int
    confidence: float
    interval: IntervalKind
    overall: Estimate
    classes: tuple[ClassAccuracy, ...]
    counts: tuple[tuple[int, ...], ...]
    """Points by mapped (row) and reference (column) class."""
    proportions: tuple[tuple[float, ...], ...]
    """Estimated share of the region's area in each cell of that table."""

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain JSON; undefined figures are None."""
        plain: dict[str, Any] = as_plain(asdict(self))
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassArea:
    """How much of a class a map shows."""

    code: int
    name: str
    pixels: int
    hectares: float
    """On the ground, whatever the map's projection does to areas."""


def estimate(
    mapped: Int[np.ndarray, " n"],
    reference: Int[np.ndarray, " n"],
    stratum: Int[np.ndarray, " n"],
    *,
    shares: Sequence[float],
    pixels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    confidence: float = 0.95,
    interval: IntervalKind = "wilson",
) -> AreaReport:
    """Estimate accuracy and area from a stratified random sample of the map's class and the true class at points.

    `stratum` numbers the strata from 0, of which `shares` are the parts of the region's area: the map's own classes,
    those of another map, or anything else known everywhere. One stratum of share 1 is a simple random sample; with
    strata that were counted but not drawn from it is post-stratified, which narrows the intervals. `pixels` counts the
    strata's pixels, where the sample is a noticeable part of them; `names` are for messages.

    The standard errors are those of the two papers. "normal" intervals, the papers' own, are the estimate plus and
    minus a multiple of them; they are too short, and may leave 0 to 1, where few points are wrong. "wilson" ones are
    score intervals at the effective sample size that the standard error implies (Franco et al. 2019,
    https://doi.org/10.1093/jssam/smy019), worked out with one point more in each stratum, spread evenly over the
    classes: a stratum in which no error was met may hold some all the same.
    """
    weight, within = np.asarray(shares, np.float64), np.asarray(stratum, np.int64)
    mapped, reference = np.asarray(mapped, np.int64), np.asarray(reference, np.int64)
    if not len(mapped) == len(reference) == len(within) > 0:
        raise InputError(
            f"{len(mapped)} mapped classes, {len(reference)} reference classes and {len(within)} strata came; "
            "wanted one of each per point"
        )
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; wanted more than 0 and less than 1, such as 0.95")
    if not np.isclose(weight.sum(), 1) or (weight <= 0).any():
        raise InputError(f"the strata's shares are {weight.round(6).tolist()}; wanted positive shares that sum to 1")
    if within.min() < 0 or within.max() >= len(weight):
        raise InputError(f"strata are numbered {within.min()} to {within.max()}; wanted 0 to {len(weight) - 1}")
    left = _left_out(
        within, None if pixels is None else np.asarray(pixels), names or list(map(str, range(len(weight))))
    )
    codes = np.union1d(mapped, reference)
    points = _Points(mapped=mapped, reference=reference, stratum=within, times=np.ones(len(mapped)))
    value, error = points.figures(codes, weight, left)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    if interval == "normal":
        low, high = value - z * error, value + z * error
    else:
        low, high = _wilson(value, *points.with_one_more(codes).figures(codes, weight, left), z)
    columns = zip(value.tolist(), error.tolist(), low.tolist(), high.tolist(), strict=True)
    figures = [Estimate(value=v, standard_error=e, low=a, high=b) for v, e, a, b in columns]
    overall, users, producers, areas, shown = figures[0], *(figures[1 + k :: 4] for k in range(4))
    is_mapped, is_true = mapped[:, None] == codes, reference[:, None] == codes
    return AreaReport(
        num_points=len(mapped),
        confidence=confidence,
        interval=interval,
        overall=overall,
        classes=tuple(
            ClassAccuracy(
                code=int(code),
                mapped_points=int(is_mapped[:, k].sum()),
                reference_points=int(is_true[:, k].sum()),
                users=users[k],
                producers=producers[k],
                area_share=areas[k],
                mapped_share=shown[k].value,
            )
            for k, code in enumerate(codes)
        ),
        counts=_rows(is_mapped.T.astype(int) @ is_true.astype(int)),
        proportions=_rows((is_mapped * points.expansion(weight)[:, None]).T @ is_true),
    )


def _left_out(stratum: np.ndarray, pixels: np.ndarray | None, names: Sequence[str]) -> np.ndarray:
    """Give the share of each stratum that is not in the sample, after checking that an error can be estimated."""
    points = np.bincount(stratum, minlength=len(names))
    left = np.ones(len(names)) if pixels is None else 1 - points / pixels
    if (left < 0).any():
        raise InputError(f"stratum {names[int(np.argmin(left))]} has more points than pixels; count them again")
    few = np.flatnonzero((points < 2) & ((points == 0) | (left > 0)))
    if len(few):
        raise InputError(
            f"stratum {names[few[0]]} has {points[few[0]]} labelled points, and an error needs 2 or more; "
            "label more of it, or merge it with another"
        )
    return left


@dataclass(frozen=True, slots=True, kw_only=True)
class _Points:
    """Points of a stratified random sample, each counted some number of times."""

    mapped: np.ndarray
    reference: np.ndarray
    stratum: np.ndarray
    times: np.ndarray

    def with_one_more(self, codes: np.ndarray) -> _Points:
        """Add a point to each stratum, mapped as its others and truly each class, or one not met, in equal parts."""
        pairs, count = np.unique(np.stack([self.stratum, self.mapped], axis=1), axis=0, return_counts=True)
        truths = np.append(codes, codes.max() + 1)
        share = count / np.bincount(self.stratum)[pairs[:, 0]] / len(truths)
        return _Points(
            mapped=np.concatenate([self.mapped, np.repeat(pairs[:, 1], len(truths))]),
            reference=np.concatenate([self.reference, np.tile(truths, len(pairs))]),
            stratum=np.concatenate([self.stratum, np.repeat(pairs[:, 0], len(truths))]),
            times=np.concatenate([self.times, np.repeat(share, len(truths))]),
        )

    def expansion(self, weight: np.ndarray) -> np.ndarray:
        """Give the share of the region that each point stands for."""
        expansion: np.ndarray = self.times * (weight / np.bincount(self.stratum, self.times))[self.stratum]
        return expansion

    def figures(self, codes: np.ndarray, weight: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Estimate overall accuracy, then for each class user's and producer's accuracy, its share and that mapped.

        All are ratios of totals; returns values and standard errors, NaN where the divisor is 0.
        """
        is_mapped, is_true = self.mapped[:, None] == codes, self.reference[:, None] == codes
        hit, everywhere = is_mapped & is_true, np.ones_like(is_true)
        of_classes = np.stack([hit, hit, is_true, is_mapped], axis=2).reshape(len(hit), -1)
        by_classes = np.stack([is_mapped, is_true, everywhere, everywhere], axis=2).reshape(len(hit), -1)
        part = np.concatenate([hit.any(1, keepdims=True), of_classes], axis=1).astype(np.float64)
        whole = np.concatenate([everywhere[:, :1], by_classes], axis=1).astype(np.float64)
        expansion = self.expansion(weight)
        total = expansion @ whole
        with np.errstate(invalid="ignore", divide="ignore"):
            value = (expansion @ part) / total
            # The first term of the Taylor series of a ratio; exact where the whole is 1 everywhere.
            residual = (part - value * whole) / total
        member = (np.arange(len(weight))[:, None] == self.stratum) * self.times
        points = member.sum(1)
        mean = member @ residual / points[:, None]
        squares = member @ (residual - mean[self.stratum]) ** 2
        # A stratum of a single pixel that is in the sample has no error.
        factor = weight**2 * left / (points * np.where(points > 1, points - 1, 1))
        return value, np.sqrt(factor @ squares)


def _wilson(value: np.ndarray, like: np.ndarray, error: np.ndarray, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Lay a score interval around a share, with as many points as give a share `like` it this standard error."""
    with np.errstate(invalid="ignore", divide="ignore"):
        sparse = np.where(error > 1e-9, (z * error) ** 2 / (like * (1 - like)), 0)  # z^2 / n; rounding is no error
    centre = (value + sparse / 2) / (1 + sparse)
    half = np.sqrt(sparse * value * (1 - value) + sparse**2 / 4) / (1 + sparse)
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)


def class_areas(path: str | Path) -> tuple[ClassArea, ...]:
    """Count the pixels and the hectares of each class of a map, block by block, in the order of the codes."""
    names, _ = read_legend(path)
    pixels, hectares = np.zeros(MAX_CLASSES, np.int64), np.zeros(MAX_CLASSES)
    for _, part, codes, valid in read_classes(path):
        seen = codes[valid]
        pixels += np.bincount(seen, minlength=MAX_CLASSES)
        hectares += np.bincount(seen, ground_hectares(part)[valid], minlength=MAX_CLASSES)
    if not pixels.any():
        raise InputError(f"{path} holds no valid pixel; give a map with some")
    return tuple(
        ClassArea(code=int(c), name=names.get(int(c), str(c)), pixels=int(pixels[c]), hectares=float(hectares[c]))
        for c in np.flatnonzero(pixels)
    )


def read_classes(path: str | Path) -> Iterator[tuple[Window, GeoBox, Int[np.ndarray, "h w"], np.ndarray]]:
    """Read a map of classes in blocks by rows: the window, its grid, the codes and where they are data."""
    if not np.issubdtype(dtype_of(path), np.integer):
        raise InputError(
            f"{path} holds {dtype_of(path)} values, not classes; give a map with whole numbers for classes"
        )
    box = grid_of(path)
    height, width = box.shape
    for row in range(0, height, BLOCK_PX):
        for col in range(0, width, BLOCK_PX):
            window = Window(col, row, min(BLOCK_PX, width - col), min(BLOCK_PX, height - row))
            part = box[row : row + window.height, col : col + window.width]
            values, valid = read_onto(path, part, bands=[1], categorical=True)
            codes = values[0].astype(np.int64)
            if codes.min() < 0 or codes.max() >= MAX_CLASSES:
                raise InputError(
                    f"{path} holds codes from {codes.min()} to {codes.max()}; wanted 0 to {MAX_CLASSES - 1}"
                )
            yield window, part, codes, valid[0]


def classes_at(path: str | Path, row: Int[np.ndarray, " n"], col: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Look up the class of single pixels of a map; -1 where it has no data or ends."""
    box = grid_of(path)
    height, width = box.shape
    codes = np.full(len(row), -1, np.int64)
    # In the order in which they are stored, so that what is read once serves neighbours.
    for n in np.lexsort((col, row)):
        r, c = int(row[n]), int(col[n])
        if 0 <= r < height and 0 <= c < width:
            values, valid = read_onto(path, box[r : r + 1, c : c + 1], bands=[1], categorical=True)
            codes[n] = int(values[0, 0, 0]) if valid[0, 0, 0] else -1
    return codes


def ground_hectares(box: GeoBox) -> Float[np.ndarray, "h w"]:
    """Work out what each pixel covers on the ellipsoid, in hectares, in any map projection or in degrees."""
    height, width = box.shape
    rows, cols = _nodes(height), _nodes(width)
    row, col = np.meshgrid(rows, cols, indexing="ij")
    across = _on_ellipsoid(box, row, col + 0.5) - _on_ellipsoid(box, row, col - 0.5)
    down = _on_ellipsoid(box, row + 0.5, col) - _on_ellipsoid(box, row - 0.5, col)
    square_metres = np.linalg.norm(np.cross(across, down), axis=-1)
    # Linear interpolation between the nodes, along rows and columns: two small matrix products.
    hectares: np.ndarray = _hats(rows, height) @ (square_metres / 10_000) @ _hats(cols, width).T
    return hectares


def _nodes(size: int) -> np.ndarray:
    return np.linspace(0, size, 2 + size // _NODE_PX)


def _hats(nodes: np.ndarray, size: int) -> np.ndarray:
    """Weights of the nodes at the centres of pixels, [size, nodes]."""
    weights: np.ndarray = np.maximum(0, 1 - np.abs(np.arange(size)[:, None] + 0.5 - nodes) / nodes[1])
    return weights


def _on_ellipsoid(box: GeoBox, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Find places of a grid in metres from the centre of the Earth, [..., 3]: no seams, no poles, no projection."""
    to_degrees, axis, flattening = _geodesy(str(box.crs))
    to = box.affine
    lon, lat = to_degrees.transform(to.a * col + to.b * row + to.c, to.d * col + to.e * row + to.f)
    lon, lat = np.radians(lon), np.radians(lat)
    shrunk = (1 - flattening) ** 2
    radius = axis / np.sqrt(np.cos(lat) ** 2 + shrunk * np.sin(lat) ** 2)
    place = radius * np.cos(lat) * np.cos(lon), radius * np.cos(lat) * np.sin(lon), shrunk * radius * np.sin(lat)
    return np.stack(place, axis=-1)


@functools.lru_cache(maxsize=64)
def _geodesy(crs: str) -> tuple[Transformer, float, float]:
    """How a coordinate system becomes degrees, with the semi-major axis and the flattening of its ellipsoid."""
    system = CRS.from_user_input(crs)
    degrees, ellipsoid = system.geodetic_crs, system.ellipsoid
    assert degrees is not None
    assert ellipsoid is not None
    flattening = 1 - ellipsoid.semi_minor_metre / ellipsoid.semi_major_metre
    return Transformer.from_crs(system, degrees, always_xy=True), ellipsoid.semi_major_metre, flattening


def _rows(table: np.ndarray) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
