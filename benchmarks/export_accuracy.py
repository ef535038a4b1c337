"""What int8 costs on real labels: probes on an encoder's features and on those of its export, on the same folds.

    python benchmarks/export_accuracy.py --data ../shared/data --work exports
    python benchmarks/export_accuracy.py --data ../shared/data --cases 3 --weights 0 1 2 --divisions 42 1 2 --own 16

One JSON line per model and question. Random weights where no others are known, one draw for each of `--weights`;
statistics of AnySat are fitted to the samples, ranges of int8 to the planet, or to `--own` samples that the probes do
not get. The difference is that of the shares of labels that ridge probes get right on folds they have not seen, in
points, with the 95 % interval of a bootstrap over blocks of ground; several draws of weights and divisions into folds
are averaged before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from panterra.evaluate.embed import embed_samples
from panterra.evaluate.probes import fit_probe
from panterra.mapping.export import export
from panterra.mapping.export_looks import Calibration
from panterra.models.anysat import AnySat
from panterra.models.exported import Engine
from panterra.models.weights import Model, load_model
from panterra.sample import collate
from real_task_sets import Material, crops, eurosat

QUESTIONS: dict[str, Callable[[Path], Material]] = {"eurosat": eurosat, "crops": partial(crops, at_most=10**6)}
CASES = (("panterra-nano", "eurosat"), ("panterra-nano", "crops"), ("anysat-tiny", "eurosat"), ("anysat-base", "crops"))
BATCH = {"eurosat": 2, "crops": 24}


def run(name: str, question: str, engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    material, size = QUESTIONS[question](args.data), BATCH[question]
    drawn = name.startswith("anysat")
    order = np.random.default_rng(5).permutation(len(material.blocks))
    own, kept = order[: args.own], order[args.own :]
    target, blocks = np.concatenate(material.targets)[kept], material.blocks[kept]
    right, cosines = [], []
    for seed in args.weights if drawn else [None]:
        model = load_model(name, random=seed)
        assert isinstance(model, Model)
        view = material.views["anysat" if isinstance(model, AnySat) else "olmoearth"]
        samples = list(view.batches)
        if isinstance(model, AnySat):
            model = model.with_statistics(model.fit_statistics(samples))
        seen = samples[0].observations
        exported, equality = export(
            model,
            args.work / f"{name}-{question}-{engine}",
            engine=engine,
            modalities=list(seen),
            dates=max(o.dates.shape[1] for sample in samples for o in sample.observations.values()),
            window_px=seen["sentinel2_l2a"].pixels.shape[-1],
            patch_m=view.patch_m,
            dtype="int8",
            batch=size,
            calibration=Calibration(source=question, batches=[samples[i] for i in own]) if args.own else None,
            overwrite=True,
        )
        cosines.append(equality.min_cosine)
        batches = [collate([samples[i] for i in kept[j : j + size]]) for j in range(0, len(kept), size)]
        for encoder in (model, exported):
            features = embed_samples(encoder, batches, patch_m=view.patch_m)
            for division in args.divisions:
                settings = {"groups": blocks, "folds": args.folds, "seed": division}
                _, report = fit_probe(features, target, kind="ridge", **settings)
                right.append((report.predictions == target).astype(float))
    exact, whole = np.stack(right).reshape(-1, 2, len(args.divisions), len(target)).transpose(1, 0, 2, 3)
    difference = (whole - exact).mean((0, 1))
    low, high = paired_interval(difference, blocks)
    return {
        "model": name,
        "question": question,
        "engine": engine,
        "samples": len(target),
        "ranges_of": args.own or "planet",
        "float32": round(float(exact.mean()), 4),
        "int8": round(float(whole.mean()), 4),
        "difference_points": [round(100 * x, 2) for x in (float(difference.mean()), low, high)],
        "of_each_draw": np.round(100 * (whole - exact).mean((1, 2)), 2).tolist(),
        "answers_that_differ": round(float((whole != exact).sum(-1).mean()), 1),
        "min_cosine_on_the_planet": round(min(cosines), 5),
    }


def paired_interval(difference: np.ndarray, blocks: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """Draw blocks with replacement, and give the range of the middle 95 % of the means."""
    block = np.unique(blocks, return_inverse=True)[1].reshape(-1)
    sums, counts = np.bincount(block, difference), np.bincount(block)
    drawn = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("exports"))
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--engines", nargs="+", default=["openvino"], choices=["openvino", "onnx"])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--weights", type=int, nargs="+", default=[0], help="seeds of random weights")
    parser.add_argument("--divisions", type=int, nargs="+", default=[42], help="seeds of divisions into folds")
    parser.add_argument("--own", type=int, default=0, help="samples that ranges are fitted to instead of the planet")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, question in (CASES[i] for i in args.cases):
        for engine in args.engines:
            print(json.dumps(run(name, question, cast(Engine, engine), args)), flush=True)


if __name__ == "__main__":
    main()
