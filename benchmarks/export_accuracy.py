"""What int8 costs on real labels: probes on an encoder's features and on those of its export, on the same folds.

    python benchmarks/export_accuracy.py --data ../shared/data --work exports

One JSON line per model and question. Random weights where no others are known; statistics of AnySat are fitted to the
samples, ranges of int8 to the planet. The difference is that of the shares of labels that ridge probes get right on
folds they have not seen, in points, with the 95 % interval of a bootstrap over blocks of ground.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from panterra.evaluate.embed import embed_samples
from panterra.evaluate.probes import fit_probe
from panterra.mapping.export import export
from panterra.models.anysat import AnySat
from panterra.models.exported import Engine
from panterra.models.weights import Model, load_model
from panterra.sample import collate
from real_task_sets import crops, eurosat

QUESTIONS = {"eurosat": eurosat, "crops": crops}
CASES = (("panterra-nano", "eurosat"), ("panterra-nano", "crops"), ("anysat-tiny", "eurosat"), ("anysat-base", "crops"))
BATCH = {"eurosat": 2, "crops": 24}


def run(name: str, question: str, engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    material, size = QUESTIONS[question](args.data), BATCH[question]
    model = load_model(name, random=0 if name.startswith("anysat") else None)
    assert isinstance(model, Model)
    view = material.views["anysat" if isinstance(model, AnySat) else "olmoearth"]
    batches = [collate(view.batches[i : i + size]) for i in range(0, len(view.batches), size)]
    if isinstance(model, AnySat):
        model = model.with_statistics(model.fit_statistics(batches))
    seen = batches[0].observations
    exported, equality = export(
        model,
        args.work / f"{name}-{question}-{engine}",
        engine=engine,
        modalities=list(seen),
        dates=max(o.dates.shape[1] for b in batches for o in b.observations.values()),
        window_px=seen["sentinel2_l2a"].pixels.shape[-1],
        patch_m=view.patch_m,
        dtype="int8",
        batch=size,
        overwrite=True,
    )
    target, right = np.concatenate(material.targets), []
    for encoder in (model, exported):
        features = embed_samples(encoder, batches, patch_m=view.patch_m)
        _, report = fit_probe(features, target, kind="ridge", groups=material.blocks, folds=args.folds)
        right.append((report.predictions == target).astype(float))
    low, high = paired_interval(right[1] - right[0], material.blocks)
    return {
        "model": name,
        "question": question,
        "engine": engine,
        "samples": len(target),
        "float32": round(float(right[0].mean()), 4),
        "int8": round(float(right[1].mean()), 4),
        "difference_points": [round(100 * x, 2) for x in (float((right[1] - right[0]).mean()), low, high)],
        "answers_that_differ": int((right[0] != right[1]).sum()),
        "min_cosine": round(asdict(equality)["min_cosine"], 5),
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, question in (CASES[i] for i in args.cases):
        for engine in args.engines:
            print(json.dumps(run(name, question, cast(Engine, engine), args)), flush=True)


if __name__ == "__main__":
    main()
