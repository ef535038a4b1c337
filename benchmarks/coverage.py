"""How often intervals and sets hold the truth, on planets where it is known everywhere.

    python benchmarks/coverage.py                        # both parts, about three minutes on two cores
    python benchmarks/coverage.py --planets 10 --part areas

One JSON line per case: the promise, the share of cases in which it was kept, and the standard error of that share over
planets. Areas: maps of a planet with errors at borders, of whole patches and of single pixels, assessed by stratified
samples of 600 points, many times over. Sets and ranges: a logistic model on two dates of Sentinel-2 bands that learns
from some spatial blocks, is calibrated on others and tested on the rest.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.evaluate.area import AreaReport, Estimate, IntervalKind, estimate
from panterra.evaluate.conformal import Score, calibrate_intervals, calibrate_sets
from panterra.evaluate.probes import fit_probe
from panterra.evaluate.sample_design import allocate
from panterra.planet import Planet

SIDE = 240
BLOCK = 12
"""Pixels along a spatial block: 120 m, about a field."""
POINTS, MINIMUM = 600, 50
CONFIDENCE, ALPHA = 0.95, 0.1
INTERVALS: tuple[IntervalKind, ...] = get_args(IntervalKind)
SCORES: tuple[Score, ...] = get_args(Score)
RARE = 0.01
"""Classes of a smaller share of the area are counted apart."""


def place(seed: int) -> GeoBox:
    """Give each planet's region, a few kilometres from the others."""
    x, y = np.random.default_rng(seed).integers(-2000, 2000, 2) * 10.0
    return GeoBox((SIDE, SIDE), Affine(10, 0, 478440 + x, 0, -10, 5295740 + y), "EPSG:32633")


def spoil(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Map the truth as classifiers do: shifted borders, whole patches confused, single pixels wrong."""
    shown = np.roll(truth, rng.integers(-2, 3, 2), axis=(0, 1))
    codes = np.unique(truth)
    confused = rng.choice(codes, len(codes))
    patch = np.kron(rng.random((SIDE // BLOCK, SIDE // BLOCK)), np.ones((BLOCK, BLOCK)))
    wrong = patch < rng.uniform(0.03, 0.15)
    shown = np.where(wrong, confused[np.searchsorted(codes, shown)], shown)
    return np.where(rng.random(truth.shape) < 0.03, rng.choice(codes, truth.shape), shown)


def figures(report: AreaReport) -> Iterator[tuple[str, int, Estimate]]:
    yield "overall accuracy", -1, report.overall
    for c in report.classes:
        yield "user's accuracy", c.code, c.users
        yield "producer's accuracy", c.code, c.producers
        yield "area", c.code, c.area_share


def areas(planets: int, samples: int) -> Iterator[dict[str, Any]]:
    kept: dict[tuple[str, ...], list[list[bool]]] = defaultdict(lambda: [[] for _ in range(planets)])
    for seed in range(planets):
        rng = np.random.default_rng([seed, 1])
        truth = Planet(seed).truth(place(seed)).astype(np.int64).ravel()
        shown = spoil(truth.reshape(SIDE, SIDE), rng).ravel()
        codes, pixels = np.unique(shown, return_counts=True)
        shares = (pixels / len(truth)).tolist()
        everything = estimate(shown, truth, np.zeros(len(truth), int), shares=(1,), pixels=(len(truth),))
        real = {(name, code): figure.value for name, code, figure in figures(everything)}
        share = {c.code: c.area_share.value for c in everything.classes}
        drawn_of = dict(
            zip(codes.tolist(), allocate(POINTS, shares, minimum=MINIMUM, pixels=pixels.tolist()), strict=True)
        )
        members = {code: np.flatnonzero(shown == code) for code in drawn_of}
        for _ in range(samples):
            drawn = np.concatenate([rng.choice(members[code], n, replace=False) for code, n in drawn_of.items()])
            for interval in INTERVALS:
                report = estimate(
                    shown[drawn],
                    truth[drawn],
                    np.searchsorted(codes, shown[drawn]),
                    shares=shares,
                    pixels=pixels.tolist(),
                    confidence=CONFIDENCE,
                    interval=interval,
                )
                for name, code, figure in figures(report):
                    value = real.get((name, code), np.nan)
                    if np.isfinite(value) and np.isfinite(figure.value):
                        size = "rare" if share.get(code, 1.0) < RARE else "common"
                        kept[name, interval, size][seed].append(figure.low <= value <= figure.high)
    for (name, kind, size), by_planet in sorted(kept.items()):
        yield {"what": name, "interval": kind, "classes": size, **summary(by_planet, CONFIDENCE)}


def observed(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Show a planet's bands of two dates, [H, W, 24], and its classes."""
    planet = Planet(seed, clouds=0)
    ground = planet.ground(place(seed))
    views = [planet.observe("sentinel2_l2a", ground, date)[0] for date in ("2023-04-28", "2023-07-22")]
    return np.moveaxis(np.concatenate(views), 0, -1), planet.truth(ground).astype(np.int64)


def sets(planets: int, splits: int) -> Iterator[dict[str, Any]]:
    kept: dict[tuple[str, ...], list[list[float]]] = defaultdict(lambda: [[] for _ in range(planets)])
    sizes: dict[tuple[str, ...], list[float]] = defaultdict(list)
    blocks = np.kron(np.arange((SIDE // BLOCK) ** 2).reshape(SIDE // BLOCK, -1), np.ones((BLOCK, BLOCK), int)).ravel()
    for seed in range(planets):
        rng = np.random.default_rng([seed, 2])
        features, truth = observed(seed)
        rows, codes = features.reshape(len(blocks), -1), truth.ravel()
        common, number = np.unique(codes, return_inverse=True)
        # A tenth of the blocks is learned from; of a class that is not there nothing can be said.
        learned = rng.permutation(blocks.max() + 1) < (blocks.max() + 1) // 10
        train = rng.choice(np.flatnonzero(learned[blocks]), 1500, replace=False)
        common = np.flatnonzero(np.bincount(number[train], minlength=len(common)) >= 10)
        train = train[np.isin(number[train], common)]
        # The summer's near infrared (the eighth band of the second date) from all of the spring.
        spring, target = np.column_stack([rows[:, :12], np.ones(len(rows))]), rows[:, 12 + 7].astype(np.float64)
        guess = spring @ np.linalg.lstsq(spring[train], target[train], rcond=None)[0]
        usable = np.flatnonzero(~learned[blocks] & np.isin(number, common))
        probe, _ = fit_probe(rows[train].astype(np.float32), number[train], split="random", folds=2)
        shares, column = probe.probabilities(rows.astype(np.float32)), np.searchsorted(common, number)
        for _ in range(splits):
            order = rng.permutation(usable)
            pools = {"pixels": (order[:500], order[500:2500])}
            held = rng.random(blocks.max() + 1) < 0.4
            pools["blocks"] = (order[held[blocks[order]]][:4000], order[~held[blocks[order]]][:6000])
            for unit, (own, new) in pools.items():
                groups = blocks[own] if unit == "blocks" else None
                for score in SCORES:
                    fitted = calibrate_sets(
                        shares[own], column[own], alpha=ALPHA, score=score, groups=groups, generator=rng
                    )
                    inside = fitted(shares[new], generator=rng)
                    kept[unit, score][seed].append(
                        mean_hit(inside[np.arange(len(new)), column[new]], blocks[new], unit)
                    )
                    sizes[unit, score].append(float(inside.sum(1).mean()))
                ranges = calibrate_intervals(guess[own], target[own], alpha=ALPHA, groups=groups)
                low, high = ranges(guess[new])
                hit = (low <= target[new]) & (target[new] <= high)
                kept[unit, "range of values"][seed].append(mean_hit(hit, blocks[new], unit))
    for (unit, what), by_planet in sorted(kept.items()):
        row = {"what": what, "exchangeable": unit, **summary(by_planet, 1 - ALPHA)}
        yield {**row, "mean_size": round(float(np.mean(sizes[unit, what])), 2)} if sizes[unit, what] else row


def mean_hit(hit: np.ndarray, block: np.ndarray, unit: str) -> float:
    """Average over what is exchangeable: over pixels, or over the means of blocks."""
    if unit == "pixels":
        return float(hit.mean())
    _, which = np.unique(block, return_inverse=True)
    return float((np.bincount(which, hit) / np.bincount(which)).mean())


def summary(by_planet: list[list[Any]], promised: float) -> dict[str, Any]:
    means = np.array([np.mean(kept) for kept in by_planet if kept])
    return {
        "promised": promised,
        "kept": round(float(means.mean()), 4),
        "standard_error": round(float(means.std(ddof=1) / np.sqrt(len(means))), 4) if len(means) > 1 else None,
        "planets": len(means),
        "cases": sum(map(len, by_planet)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["areas", "sets"], help="only one of the two")
    parser.add_argument("--planets", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=60, help="samples, or splits, per planet")
    options = parser.parse_args()
    parts = {"areas": areas, "sets": sets}
    for name in [options.part] if options.part else parts:
        for line in parts[name](options.planets, options.repeats):
            print(json.dumps({"part": name, **line}), flush=True)


if __name__ == "__main__":
    main()
