"""How fast exported encoders are, and what they lose, beside the encoder itself with the same weights in one run.

    python benchmarks/export.py --eurosat ../shared/data/eurosat_ms --work exports
    python benchmarks/export.py --models olmoearth-v1.2-nano --variants onnx:float32 onnx:int8

One JSON line per case, medians over interleaved repeats on one thread. Exports are kept in --work and used again.
`eurosat` and `planet` are the shares of labels that a logistic probe on the features gets right on folds that it has
not seen: scenes of real images, and land cover of patches.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from affine import Affine
from odc.geo.geobox import GeoBox

from panterra.errors import InputError
from panterra.evaluate.embed import embed_samples
from panterra.evaluate.probes import fit_probe
from panterra.mapping.export import export
from panterra.modalities import MODALITIES
from panterra.models.anysat import AnySat
from panterra.models.exported import Engine, Exported, Precision, open_exported
from panterra.models.features import Encoder
from panterra.models.weights import Model, load_model, passport
from panterra.planet import CRS, Planet
from panterra.sample import Batch, Observation, collate, to_days

MODELS = {"olmoearth-v1.2-nano": 64, "olmoearth-v1.2-tiny": 64, "anysat-tiny": 64, "anysat-base": 16}
"""The side of the windows that each is shown, in pixels; the base size is for its speed alone."""
VARIANTS = (
    *("torch:float32", "torch:bfloat16", "onnx:float32", "onnx:int8"),
    *("openvino:float32", "openvino:bfloat16", "openvino:int8"),
)
MODALITY, PATCH_M, BATCH = "sentinel2_l2a", 40.0, 2
DATES = ("2023-04-28", "2023-06-09", "2023-07-22", "2023-09-14")
L1C = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")


def planet_windows(px: int, count: int) -> tuple[Batch, np.ndarray]:
    """Image some places, and give the class of each patch's centre."""
    planet, batches, classes, side = Planet(seed=3), [], [], round(PATCH_M / 10)
    for place in range(count):
        box = GeoBox((px, px), Affine(10, 0, 470000 + 3000 * place, 0, -10, 5295740), CRS)
        ground = planet.ground(box)
        images = [planet.observe(MODALITY, ground, date) for date in DATES]
        pixels, valid = (np.stack(parts) for parts in zip(*images, strict=True))
        batches.append(Batch(observations={MODALITY: Observation.build(pixels, DATES, valid)}))
        classes.append(planet.truth(ground)[side // 2 :: side, side // 2 :: side])
    return collate(batches), np.stack(classes)


def eurosat_images(folder: Path) -> tuple[list[Batch], np.ndarray]:
    """Read the images in their declared unit, with top-of-atmosphere values in place of surface reflectance."""
    with (folder / "index.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    order = [L1C.index(band) + 1 for band in MODALITIES[MODALITY].band_names]
    batches = []
    for name, *_ in rows:
        with rasterio.open(folder / name) as image:
            pixels = image.read(order).astype(np.float32)
        batches.append(Batch(observations={MODALITY: Observation.build(pixels, [to_days("2018-07-01")])}))
    names = [row[1] for row in rows]
    return batches, np.unique(names, return_inverse=True)[1]


def right(features: np.ndarray, target: np.ndarray, groups: np.ndarray) -> float:
    seen = np.isfinite(features).all(1)
    spread = [c for c in np.unique(target) if len(np.unique(groups[seen & (target == c)])) >= 3]
    kept = seen & np.isin(target, spread)
    _, report = fit_probe(features[kept], target[kept], kind="logistic", groups=groups[kept], folds=3)
    return round(report.metrics["accuracy"].estimate, 4)


def opened(model: Model, variant: str, px: int, work: Path) -> Exported:
    engine, dtype = variant.split(":")
    assert engine in get_args(Engine)
    out = work / f"{model.name.split()[0]}-{engine}-{dtype}"
    if out.exists():
        return open_exported(out)
    made, _ = export(
        model,
        out,
        engine=cast(Engine, engine),
        modalities=[MODALITY],
        dates=len(DATES),
        window_px=px,
        patch_m=PATCH_M,
        dtype=cast(Precision, dtype),
        batch=BATCH,
    )
    return made


def run(name: str, args: argparse.Namespace) -> None:
    px = MODELS[name]
    windows, classes = planet_windows(px, args.windows)
    model = load_model(name, random=0)
    assert isinstance(model, Model)
    if isinstance(model, AnySat):
        model = model.with_statistics(model.fit_statistics([windows]))
    encoders: dict[str, Encoder] = {"encoder:float32": model}
    half = load_model(name, random=0, dtype=torch.bfloat16)
    statistics_of = passport(model).get("statistics", {})
    encoders["encoder:bfloat16"] = half.with_statistics(statistics_of) if isinstance(half, AnySat) else half
    for variant in args.variants:
        try:
            encoders[variant] = opened(model, variant, px, args.work)
        except InputError as error:
            print(json.dumps({"model": name, "variant": variant, "error": str(error)}), flush=True)
    parts = [take(windows, i) for i in range(0, args.windows, BATCH)]
    seconds: dict[str, list[float]] = {variant: [] for variant in encoders}
    for _ in range(args.repeats + 1):
        for variant, encoder in encoders.items():
            seconds[variant].append(timed(encoder, parts[0]))
    reference = embed_samples(model, parts, patch_m=PATCH_M, what="patches")
    median = {variant: statistics.median(times[1:]) for variant, times in seconds.items()}
    for variant, encoder in encoders.items():
        patches = embed_samples(encoder, parts, patch_m=PATCH_M, what="patches")
        seen = np.isfinite(reference).all(-1)
        a, b = (torch.from_numpy(x[seen]).double() for x in (reference, patches))
        cosine = F.cosine_similarity(a, b, dim=1)
        result: dict[str, Any] = {
            "model": name,
            "variant": variant,
            "window_px": px,
            "seconds_per_window": round(median[variant] / BATCH, 4),
            "speed": round(median["encoder:float32"] / median[variant], 2),
            "mean_cosine": round(float(cosine.mean()), 6),
            "min_cosine": round(float(cosine.min()), 6),
        }
        if isinstance(encoder, Exported):
            size = sum(file.stat().st_size for file in Path(encoder.name).iterdir())
            result["megabytes"] = round(size / 1e6, 1)
        if name != "anysat-base":
            place = np.arange(args.windows)[:, None, None].repeat(px // 4, 1).repeat(px // 4, 2)
            result["planet"] = right(patches.reshape(-1, encoder.dim), classes.ravel(), place.ravel())
            if args.eurosat:
                images, labels = eurosat_images(args.eurosat)
                batches = [collate(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
                features = embed_samples(encoder, batches, patch_m=PATCH_M)
                result["eurosat"] = right(features, labels, np.arange(len(labels)))
        print(json.dumps(result), flush=True)


def take(batch: Batch, start: int) -> Batch:
    o, stop = batch.observations[MODALITY], start + BATCH
    part = Observation(pixels=o.pixels[start:stop], dates=o.dates[start:stop], valid=o.valid[start:stop])
    return Batch(observations={MODALITY: part})


def timed(encoder: Encoder, batch: Batch) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        encoder.encode(batch, patch_m=PATCH_M)
        return time.perf_counter() - start


def main(names: Iterable[str], args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in names:
        run(name, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--eurosat", type=Path)
    parser.add_argument("--work", type=Path, default=Path("exports"))
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.models, arguments)
