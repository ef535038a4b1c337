"""What `panterra-nano` is worth beside random weights and raw band statistics: the figures of its card.

    python benchmarks/nano.py                                # EuroSAT sample and planets that it never saw
    python benchmarks/nano.py --model run/model --sets planet

EuroSAT: 130 images of ten classes, cells of one degree kept whole in five folds. An image is the mean and the standard
deviation of its patches of 40 m, as raw statistics hold both of its pixels; `--pooling mean` leaves the latter out.
Planet: patches of 40 m with one of eleven classes on 480 planets (seeds from 9000), four dates of one year, whole
planets in five folds. All features are standardised. A kNN and a logistic probe each; intervals of 95 % from
resampling cells or planets, "gain" over the better of raw statistics and the mean of the draws of random weights, in
pairs. One JSON line per row. The sample is found through PANTERRA_DATA.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.evaluate.embed import embed_samples, raw_band_statistics, raw_patch_statistics
from panterra.evaluate.metrics import bootstrap
from panterra.evaluate.probes import Kind, fit_probe
from panterra.models.features import Encoder
from panterra.models.weights import load_model
from panterra.planet import CRS, Planet
from panterra.sample import Batch, Observation, to_days
from real_data import as_level_2a

DATES = ("2023-04-20", "2023-06-15", "2023-08-10", "2023-10-05")
PLANETS, SIDE_PX, CELLS, PER_CLASS = range(9000, 9480), 32, 4, 4
MIXTURES = {
    "planet, Sentinel-2": ("sentinel2_l2a",),
    "planet, Sentinel-1": ("sentinel1",),
    "planet, Landsat": ("landsat",),
    "planet, all three": ("sentinel2_l2a", "sentinel1", "landsat"),
}
PATCH_M = 40
PROBES: tuple[Kind, ...] = ("knn", "logistic")
RAW, RANDOM = "raw band statistics", "random weights"


def eurosat(data: Path) -> tuple[list[Batch], np.ndarray, np.ndarray]:
    """Read the images, their classes and their cells of one degree."""
    folder = data / "eurosat_ms"
    rows = [line.split(",") for line in (folder / "index.csv").read_text().splitlines()[1:]]
    lonlat = np.array([[float(row[4]), float(row[5])] for row in rows])
    cells = np.unique(np.floor(lonlat), axis=0, return_inverse=True)[1].reshape(-1)
    with tempfile.TemporaryDirectory() as work:
        batches = [as_level_2a(folder / row[0], Path(work) / Path(row[0]).stem) for row in rows]
    return batches, np.array([int(row[2]) for row in rows]), cells


def planets() -> tuple[list[Batch], np.ndarray]:
    """Look at a square of 320 m on each planet; give batches, and class codes per patch, 0 where they are mixed."""
    batches, codes = [], []
    rng = np.random.default_rng(1)
    for seed in PLANETS:
        left, top = 500000 + 10 * rng.integers(-20000, 20000), 5300000 + 10 * rng.integers(-20000, 20000)
        there = Planet(seed=seed)
        ground = there.ground(GeoBox((SIDE_PX, SIDE_PX), Affine(10, 0, left, 0, -10, top), CRS))
        seen = {}
        for m in MIXTURES["planet, all three"]:
            looks = [there.observe(m, ground, dt.date.fromisoformat(day)) for day in DATES]
            pixels, valid = (torch.from_numpy(np.stack(part))[None] for part in zip(*looks, strict=True))
            dates = torch.tensor([[to_days(day) for day in DATES]])
            seen[m] = Observation(pixels=pixels, dates=dates, valid=valid)
        batches.append(Batch(observations=seen))
        side = SIDE_PX // CELLS
        blocks = there.truth(ground).reshape(side, CELLS, side, CELLS).swapaxes(1, 2).reshape(side, side, -1)
        counts = (blocks[..., None] == np.arange(12)).sum(2)
        codes.append(np.where(counts.max(-1) >= 0.75 * CELLS**2, counts.argmax(-1), 0))
    return batches, np.stack(codes)


def drawn(codes: np.ndarray) -> np.ndarray:
    """Draw a few patches of each class from every planet: [N, 3], planet, row and column."""
    rng, found = np.random.default_rng(0), []
    for i, square in enumerate(codes):
        for code in np.unique(square[square > 0]):
            found += [(i, *place) for place in rng.permutation(np.argwhere(square == code))[:PER_CLASS]]
    return np.array(found)


def described(encoder: Encoder, batches: Sequence[Batch], pooling: str) -> np.ndarray:
    """Describe images by the mean of their patches, and the standard deviation too where it is asked for."""
    patches = embed_samples(encoder, batches, patch_m=PATCH_M, what="patches")
    statistics = [patches.mean((1, 2)), *([patches.std((1, 2))] if pooling == "mean+std" else [])]
    return standardised(np.concatenate(statistics, axis=1))


def standardised(x: np.ndarray) -> np.ndarray:
    """Give each feature mean 0 and deviation 1: cosines of raw numbers say little."""
    spread = x.std(0)
    scaled: np.ndarray = (x - x.mean(0)) / np.where(spread > 0, spread, 1)
    return scaled


def interval(hits: np.ndarray, groups: np.ndarray) -> list[float]:
    """Average over samples (shares of draws that were right, or differences of these), resampling groups."""
    number = np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(number, hits), np.bincount(number)], axis=1)
    mean = bootstrap(lambda s: s[..., 0] / s[..., 1], sums)
    return [round(v, 3) for v in (mean.estimate, mean.low, mean.high)]


def compare(name: str, features: Iterator[tuple[str, np.ndarray]], targets: np.ndarray, groups: np.ndarray) -> None:
    """Fit both probes to every feature set; the last one is held against raw statistics and the mean of the draws."""
    right: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in PROBES}
    names = {int(c): str(c) for c in np.unique(targets)}

    def show(probe: str, features_name: str, hits: np.ndarray, **more: object) -> None:
        row = {"set": name, "n": len(targets), "features": features_name, "probe": probe}
        print(json.dumps({**row, "accuracy": interval(hits, groups), **more}), flush=True)

    for features_name, x in features:
        for probe in PROBES:
            _, report = fit_probe(x, targets, kind=probe, groups=groups, folds=5, neighbours=5, names=names)
            hits = right[probe][features_name] = (report.predictions == targets).astype(np.float64)
            if features_name != RAW and not features_name.startswith(RANDOM):
                draws = [v for n, v in right[probe].items() if n.startswith(RANDOM)]
                mean = np.mean(draws, axis=0)
                show(probe, f"{RANDOM}, mean of {len(draws)} draws", mean)
                best = max(mean, right[probe][RAW], key=np.mean)
                show(probe, features_name, hits, gain=interval(hits - best, groups))
            else:
                show(probe, features_name, hits)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="panterra-nano")
    parser.add_argument("--draws", type=int, default=5, help="of random weights")
    parser.add_argument("--sets", nargs="+", default=["eurosat", "planet"], choices=["eurosat", "planet"])
    parser.add_argument("--pooling", default="mean+std", choices=["mean", "mean+std"], help="of EuroSAT's patches")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PANTERRA_DATA", "../shared/data")))
    options = parser.parse_args()
    encoders = [
        *((f"{RANDOM}, draw {i}", load_model("panterra-nano", random=i)) for i in range(options.draws)),
        (options.model, load_model(options.model)),
    ]
    if "eurosat" in options.sets:
        batches, targets, cells = eurosat(options.data)
        raw = standardised(np.concatenate([raw_band_statistics(batch) for batch in batches]))
        embedded = ((name, described(e, batches, options.pooling)) for name, e in encoders)
        compare("EuroSAT sample", itertools.chain([(RAW, raw)], embedded), targets, cells)
    if "planet" in options.sets:
        seen, codes = planets()
        at = drawn(codes)
        picked = tuple(at.T)
        for name, modalities in MIXTURES.items():
            batches = [Batch(observations={m: batch.observations[m] for m in modalities}) for batch in seen]
            raw = np.concatenate([raw_patch_statistics(batch, PATCH_M) for batch in batches])[picked]
            seen_there = np.isfinite(raw).all(1)  # some squares lie beside the swaths of Landsat
            embedded = (
                (label, standardised(embed_samples(e, batches, patch_m=PATCH_M, what="patches")[picked][seen_there]))
                for label, e in encoders
            )
            features = itertools.chain([(RAW, standardised(raw[seen_there]))], embedded)
            compare(name, features, codes[picked][seen_there], at[seen_there, 0])


if __name__ == "__main__":
    main()
