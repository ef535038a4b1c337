"""Whether a tiny AnySat that was pretrained on the invented planet knows its land cover better than random weights.

    python benchmarks/anysat_planet.py /tmp/anysat-planet            # regions, training and evaluation
    python benchmarks/anysat_planet.py /tmp/anysat-planet --steps 200  # a short run

One JSON line for the training and one for each set of sensors, patch size, encoder and probe. Probes are fitted on
patches of 60 m tiles on planets that were never trained on, whole planets in each of five folds; intervals come from
resampling planets. "gain" is the accuracy above the better of two draws of random weights, resampled in pairs, and
"gain_over_start" that above random weights whose first layers and scales were set from data, as the run starts.
What was drawn is kept in the folder; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from panterra.evaluate.embed import raw_patch_statistics
from panterra.evaluate.metrics import Interval, bootstrap
from panterra.evaluate.probes import Kind, Report, fit_probe
from panterra.models.anysat import AnySat
from panterra.models.weights import load_model
from panterra.objectives.jepa import JEPA
from panterra.planet import CLASSES
from panterra.recipes.anysat_planet import (
    CLOSE,
    CLOSE_M,
    DATES,
    FAR,
    FAR_M,
    SERIES,
    LabelledPatches,
    Regions,
    Tiles,
    choose_patches,
    draw_regions,
    embed_patches,
    land_cover_check,
    planet_run,
    planet_statistics,
    planet_tiny,
)
from panterra.train.loop import Options, train

TEST, WATCHED = range(9000, 9132), range(9900, 9966)
TILE_M = 60
SENSORS = {
    "aerial": ("aerial",),
    "s2": ("sentinel2_l2a",),
    "s1": ("sentinel1",),
    "landsat": ("landsat",),
    "all": tuple(DATES),
    "aerial + landsat": ("aerial", "landsat"),
    "s1 + landsat": ("sentinel1", "landsat"),
}
TRAINED_PATCH_M, NEW_PATCH_M = 20, 30
CASES = [(name, TRAINED_PATCH_M) for name in SENSORS] + [(name, NEW_PATCH_M) for name in SENSORS]
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def regions(folder: Path, planets: range, metres: int, modalities: Sequence[str], *, shard: int) -> Regions:
    """Draw regions, or read what was drawn before."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(0, len(planets), shard):
        path = folder / f"{planets[i]}-{metres}m.npz"
        if not path.exists():
            draw_regions(planets[i : i + shard], metres=metres, modalities=modalities).save(path)
        paths.append(path)
    return Regions.read(paths)


def no_model(tiles: Tiles, patch_m: int) -> LabelledPatches:
    """Describe patches by simple statistics of their pixels."""
    grids = np.concatenate([raw_patch_statistics(batch, patch_m) for batch in tiles.batches(8)])
    return choose_patches(grids, tiles, patch_m=patch_m)


def gain(report: Report, others: Sequence[Report], patches: LabelledPatches) -> Interval:
    """Compare a probe's accuracy with that of the best of others on the same patches, planet by planet."""
    other = max(others, key=lambda r: r.metrics["accuracy"].estimate)
    ahead = (report.predictions == patches.codes).astype(int) - (other.predictions == patches.codes)
    planet = np.unique(patches.planets, return_inverse=True)[1]
    sums = np.stack([np.bincount(planet, ahead), np.bincount(planet)], axis=1)
    return bootstrap(lambda s: s[..., 0] / s[..., 1], sums)


def rounded(interval: Interval) -> list[float]:
    return [round(x, 4) for x in (interval.estimate, interval.low, interval.high)]


def evaluate(encoders: dict[str, AnySat], test: Regions, names: dict[int, str]) -> None:
    for name, patch_m in CASES:
        tiles = Tiles(regions=test, metres=TILE_M, modalities=SENSORS[name])
        found = {label: embed_patches(encoder, tiles, patch_m=patch_m) for label, encoder in encoders.items()}
        kinds: dict[Kind, dict[str, LabelledPatches]] = {"knn": found, "logistic": found}
        if patch_m == TRAINED_PATCH_M:
            kinds["logistic"] = found | {"no model": no_model(tiles, patch_m)}
        for kind, given in kinds.items():
            reports = {
                label: fit_probe(p.features, p.codes, kind=kind, groups=p.planets, names=names, strengths=STRENGTHS)[1]
                for label, p in given.items()
            }
            for label, report in reports.items():
                line: dict[str, Any] = {"sensors": name, "patch_m": patch_m, "encoder": label, "probe": kind}
                line |= {"patches": report.num_samples, "planets": report.num_groups}
                line |= {key: rounded(report.metrics[key]) for key in ("accuracy", "macro_f1")}
                if label == "pretrained":
                    random = [r for other, r in reports.items() if other.startswith("random")]
                    line["gain"] = rounded(gain(report, random, given[label]))
                    line["gain_over_start"] = rounded(gain(report, [reports["start"]], given[label]))
                print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", default="run", help="name of the run's folder inside it")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, help="of first weights and batches; the recipe's if left out")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    drawn, everything = args.folder / "regions", tuple(DATES)
    close = regions(drawn, CLOSE, CLOSE_M, everything, shard=8)
    far = regions(drawn, FAR, FAR_M, SERIES, shard=100)
    watched = regions(drawn, WATCHED, TILE_M, everything, shard=22)
    test = regions(drawn, TEST, TILE_M, everything, shard=22)

    recipe = planet_tiny()
    if args.steps:
        recipe = replace(recipe, steps=args.steps, warmup_steps=min(recipe.warmup_steps, args.steps // 4))
    if args.seed is not None:
        recipe = replace(recipe, data_seed=args.seed, init_seed=args.seed)
    statistics = planet_statistics(close, far)
    shown = {name: SENSORS[name] for name in ("aerial", "s2", "s1", "landsat", "all")}
    check = land_cover_check(
        {name: Tiles(regions=watched, metres=TILE_M, modalities=given) for name, given in shown.items()}, every=300
    )
    run = planet_run(recipe, close, far, statistics=statistics, checks=(check,))
    started = time.process_time()
    options = Options(device=args.device, workers=0, logs=("jsonl",), save_every=100, log_every=20)
    result = train(run, args.folder / args.run, options)
    print(
        json.dumps(
            {
                "steps": result.step,
                "samples": result.samples,
                "loss": result.loss,
                "seconds": round(result.seconds),
                "cpu_seconds": round(time.process_time() - started),
                "kwh": result.kwh,
            }
        ),
        flush=True,
    )

    assert result.model is not None
    encoders: dict[str, AnySat] = {}
    trained = load_model(result.model)
    assert isinstance(trained, AnySat)
    encoders["pretrained"] = trained
    for seed in (1, 2):
        torch.manual_seed(seed)
        encoders[f"random {seed}"] = AnySat(recipe.encoder, statistics=statistics).eval()
    torch.manual_seed(3)
    start = cast(JEPA, run.objective()).teacher.eval()
    start.statistics = dict(statistics)
    encoders["start"] = start
    evaluate(encoders, test, {c.code: c.name for c in CLASSES})


if __name__ == "__main__":
    main()
