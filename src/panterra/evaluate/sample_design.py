"""Where to look, to learn how good a map is.

A stratified random sample of the pixels of a map of classes, planned as Olofsson et al. (2014,
https://doi.org/10.1016/j.rse.2014.02.015) recommend. Points are drawn uniformly over the ground: where pixels differ
in size, as in degrees, a pixel's chance is in proportion to its area, so that shares of points are shares of area.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from rasterio.warp import transform

from panterra.errors import InputError
from panterra.evaluate.area import MAX_CLASSES, ClassArea, class_areas, ground_hectares, read_classes
from panterra.files import write_whole
from panterra.imagery.raster import crs_for_rasterio, grid_of

Allocation = Literal["proportional", "equal", "neyman"]

USERS_ACCURACY = 0.8
"""What is conjectured of a class that nothing is said about."""
STANDARD_ERROR = 0.02
"""Of overall accuracy; about a quarter of the width of its 95 % interval."""
MINIMUM = 50
"""Points in each stratum at least: the lower end of what Olofsson et al. advise for rare classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """How many points are drawn from each stratum, and why."""

    strata: tuple[ClassArea, ...]
    points: tuple[int, ...]
    users_accuracy: tuple[float, ...]
    """Conjectured."""
    allocation: Allocation
    seed: int

    @property
    def shares(self) -> tuple[float, ...]:
        """The parts of the region's area."""
        total = sum(s.hectares for s in self.strata)
        return tuple(s.hectares / total for s in self.strata)

    @property
    def standard_error(self) -> float:
        """Of overall accuracy, should the conjectures hold."""
        terms = zip(self.shares, self.points, self.users_accuracy, self.strata, strict=True)
        return math.sqrt(sum(w**2 * u * (1 - u) / n * (1 - n / s.pixels) for w, n, u, s in terms))


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnPixels:
    """A random sample of pixels, in random order."""

    row: Int[np.ndarray, " n"]
    col: Int[np.ndarray, " n"]
    code: Int[np.ndarray, " n"]
    """The class that the map shows there: the stratum."""


def sample_size(
    shares: Sequence[float],
    users_accuracy: Sequence[float],
    standard_error: float,
    *,
    pixels: Sequence[int] | None = None,
) -> int:
    """Tell how many points give overall accuracy a standard error (Cochran 1977, equation 5.25).

    `shares` are the strata's parts of the area, `users_accuracy` what is conjectured of each. `pixels` counts the
    strata's pixels, where the sample may be a noticeable part of them.
    """
    weight, users = np.asarray(shares, np.float64), _conjectured(users_accuracy)
    if not 0 < standard_error < 0.5:
        raise InputError(f"a standard error of {standard_error} was asked for; wanted more than 0 and less than 0.5")
    spread = np.sqrt(users * (1 - users))
    finite = 0.0 if pixels is None else float(weight @ spread**2) / sum(pixels)
    return math.ceil(float(weight @ spread) ** 2 / (standard_error**2 + finite))


def allocate(
    total: int,
    shares: Sequence[float],
    *,
    how: Allocation = "proportional",
    users_accuracy: Sequence[float] | None = None,
    minimum: int = 0,
    pixels: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Deal `total` points to strata: in proportion to area, equally, or to area times spread (Neyman).

    Proportional serves overall accuracy, equal the user's accuracy of each class, Neyman overall accuracy where the
    conjectured accuracies differ. Each stratum gets `minimum` points, or all its pixels where it has fewer, and what is
    left is dealt to the others in the same proportions.
    """
    weight = np.asarray(shares, np.float64)
    if how == "neyman":
        if users_accuracy is None:
            raise InputError("Neyman allocation needs the user's accuracy to be conjectured for each class; give it")
        users = _conjectured(users_accuracy)
        wanted = weight * np.sqrt(users * (1 - users))
    else:
        wanted = weight if how == "proportional" else np.ones_like(weight)
    most = np.full(len(weight), total) if pixels is None else np.asarray(pixels, np.int64)
    least = np.minimum(minimum, most)
    if not least.sum() <= total <= most.sum():
        raise InputError(
            f"{total} points cannot be dealt to {len(weight)} strata with {minimum} or more in each and "
            f"{most.sum()} pixels in all; ask for {least.sum()} to {most.sum()}, or for another minimum"
        )
    # The multiple of the proportions that, held within the bounds, adds up to the total.
    low, high = 0.0, float(most.max() / wanted.min())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * wanted, least, most).sum() < total else (low, middle)
    dealt = np.clip(high * wanted, least, most)
    whole = np.floor(dealt + 1e-6).astype(np.int64)
    by_remainder = np.argsort(whole - dealt, kind="stable")
    whole[by_remainder[: total - whole.sum()]] += 1
    return tuple(int(n) for n in whole)


def design_sample(
    path: str | Path,
    *,
    size: int | None = None,
    standard_error: float = STANDARD_ERROR,
    users_accuracy: Mapping[str, float] | None = None,
    allocation: Allocation = "proportional",
    minimum: int = MINIMUM,
    seed: int = 42,
) -> Design:
    """Plan a stratified random sample of a map of classes, each class a stratum.

    The number of points is `size`, or what the standard error of overall accuracy asks for, and enough for `minimum` in
    each stratum. `users_accuracy` conjectures, by class name or code, how much of what is mapped as it is right.
    """
    strata = class_areas(path)
    given = dict(users_accuracy or {})
    for name, share in given.items():
        if not 0 < share < 1:
            raise InputError(f"the user's accuracy of {name} is {share:g}; wanted more than 0 and less than 1")
    users = tuple(given.pop(s.name, given.pop(str(s.code), USERS_ACCURACY)) for s in strata)
    if given:
        raise InputError(f"{path} shows no class {next(iter(given))!r}; it shows {', '.join(s.name for s in strata)}")
    hectares, pixels = [s.hectares for s in strata], [s.pixels for s in strata]
    shares = [h / sum(hectares) for h in hectares]

    def of_size(total: int) -> Design:
        points = allocate(total, shares, how=allocation, users_accuracy=users, minimum=minimum, pixels=pixels)
        alone = [s.name for s, n in zip(strata, points, strict=True) if n < min(2, s.pixels)]
        if alone:
            raise InputError(f"class {alone[0]!r} would get fewer than 2 points; raise the size or the minimum")
        return Design(strata=strata, points=points, users_accuracy=users, allocation=allocation, seed=seed)

    if size is not None:
        return of_size(size)
    size = max(sample_size(shares, users, standard_error, pixels=pixels), sum(min(minimum, n) for n in pixels))
    design = of_size(min(size, sum(pixels)))
    # The formula supposes Neyman's allocation; any other needs somewhat more.
    while design.standard_error > standard_error and size < sum(pixels):
        size = min(math.ceil(1.01 * size), sum(pixels))
        design = of_size(size)
    return design


def draw(path: str | Path, points: Mapping[int, int], *, seed: int = 42) -> DrawnPixels:
    """Draw pixels of each class without replacement, in one pass over the map and bounded memory.

    `points` says how many of each code. A pixel's luck depends on the seed and its place alone, so more points from the
    same seed contain the fewer.
    """
    width = grid_of(path).shape.x
    wanted = np.zeros(MAX_CLASSES, np.int64)
    wanted[list(points)] = list(points.values())
    highest = np.where(wanted > 0, np.inf, -np.inf)
    place, code, key = np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0)
    for window, part, codes, valid in read_classes(path):
        rows = np.arange(window.row_off, window.row_off + window.height, dtype=np.uint64)[:, None]
        here = (rows * np.uint64(width) + np.arange(window.col_off, window.col_off + window.width, dtype=np.uint64))[
            valid
        ]
        # Efraimidis and Spirakis (2006): the smallest of exponential waiting times, whose rates are the areas.
        waits = -np.log(_luck(here, seed)) / ground_hectares(part)[valid]
        chosen = waits < highest[codes[valid]]
        place = np.concatenate([place, here[chosen]])
        code = np.concatenate([code, codes[valid][chosen]])
        key = np.concatenate([key, waits[chosen]])
        order = np.lexsort((key, code))
        place, code, key = place[order], code[order], key[order]
        rank = np.arange(len(code)) - np.searchsorted(code, code)
        last = rank == wanted[code] - 1
        highest[code[last]] = key[last]
        kept = rank < wanted[code]
        place, code, key = place[kept], code[kept], key[kept]
    for stratum, number in points.items():
        if (code == stratum).sum() < number:
            raise InputError(f"{path} has {(code == stratum).sum()} pixels of class {stratum}, fewer than {number}")
    mixed = np.argsort(_luck(place, seed + 1))
    row, col = np.divmod(place[mixed].astype(np.int64), width)
    return DrawnPixels(row=row, col=col, code=code[mixed])


def write_points(path: str | Path, out: str | Path, design: Design) -> Path:
    """Draw a design's points from its map and write them as GeoJSON with an empty `reference` to fill in.

    Each point says its stratum and the stratum's hectares and pixels, which is all that the estimators need; so it may
    be edited with any program that keeps the columns. A file that is there is never replaced: it may be filled in.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists, and someone may have filled it in; choose another name")
    drawn = draw(path, {s.code: n for s, n in zip(design.strata, design.points, strict=True)}, seed=design.seed)
    box = grid_of(path)
    to, col, row = box.affine, drawn.col + 0.5, drawn.row + 0.5
    x, y = to.a * col + to.b * row + to.c, to.d * col + to.e * row + to.f
    lon, lat = transform(crs_for_rasterio(box.crs), "EPSG:4326", x, y)[:2]
    by_code = {s.code: s for s in design.strata}
    features: list[dict[str, Any]] = [
        {
            "type": "Feature",
            "id": number,
            "properties": {
                "id": number,
                "stratum": code,
                "stratum_name": by_code[code].name,
                "stratum_ha": by_code[code].hectares,
                "stratum_pixels": by_code[code].pixels,
                "lon": round(lon[n], 9),
                "lat": round(lat[n], 9),
                "reference": None,
            },
            "geometry": {"type": "Point", "coordinates": [round(lon[n], 9), round(lat[n], 9)]},
        }
        for n, (number, code) in enumerate(enumerate(drawn.code.tolist(), start=1))
    ]
    about = {
        "map": Path(path).name,
        "seed": design.seed,
        "allocation": design.allocation,
        "standard_error": design.standard_error,
        "strata": [
            {"stratum": s.code, "name": s.name, "share": w, "points": n, "users_accuracy": u}
            for s, w, n, u in zip(design.strata, design.shares, design.points, design.users_accuracy, strict=True)
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    collection = {"type": "FeatureCollection", "name": out.stem, "panterra:design": about, "features": features}
    return write_whole(out, json.dumps(collection, indent=1, ensure_ascii=False) + "\n")


def _conjectured(users_accuracy: Sequence[float]) -> np.ndarray:
    users = np.asarray(users_accuracy, np.float64)
    if not ((users > 0) & (users < 1)).all():
        raise InputError(f"user's accuracies of {users.tolist()} were conjectured; wanted more than 0 and less than 1")
    return users


def _luck(place: np.ndarray, seed: int) -> np.ndarray:
    """Hash places to uniform numbers in (0, 1), by SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + _mix(np.array([seed % 2**64], np.uint64))
        uniform: np.ndarray = (_mix(mixed) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
    return uniform


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed
