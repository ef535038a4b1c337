"""What `map` spends outside the encoder, and how its memory grows with the scene.

    python benchmarks/mapping.py                                    # the encoder's share, then memory
    python benchmarks/mapping.py --share-px 2048 --model olmoearth-v1.2-tiny

One JSON line per case, each in a process of its own. `encoder_share` is the part of the wall time during which the
encoder computes; reading, probe and writing run beside it. Memory is the process's peak. It does not depend on what the
encoder computes, so it is measured with one that averages bands, on which a large scene takes a minute.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.windows import Window
from torch.nn.functional import avg_pool2d

from panterra.evaluate.probes import Probe, ProbeClass
from panterra.imagery.stac import make_item, save_scene
from panterra.mapping.run import map as make_map
from panterra.models.features import Encoder, Features
from panterra.models.weights import load_model
from panterra.sample import Batch


class BandMeans:
    """An encoder that costs next to nothing: each patch's mean bands, repeated to a usual width."""

    name = "band-means"
    modalities: tuple[str, ...] = ("sentinel2_l2a",)
    dim = 128

    def encode(self, batch: Batch, *, patch_m: float, dense: bool = False) -> Features:
        o = batch.observations["sentinel2_l2a"]
        means = avg_pool2d(o.pixels[:, 0], round(patch_m / batch.pixel_m)).movedim(1, -1) / 1000
        patches = means.repeat(1, 1, 1, 11)[..., : self.dim]
        valid = torch.ones(patches.shape[:3], dtype=torch.bool)
        return Features(patches=patches, summary=patches.mean((1, 2)), valid=valid, patch_m=patch_m)


def write_scene(folder: Path, size: int) -> None:
    """Write one Sentinel-2 date of `size` x `size` pixels, uncompressed so that it is quick to make."""
    box = GeoBox((size, size), Affine(10, 0, 500000, 0, -10, 5000000), "EPSG:32633")
    pixels = np.random.default_rng(0).integers(200, 4000, (12, 512, 512)).astype(np.uint16)
    folder.mkdir(parents=True)
    layout: dict[str, Any] = {"tiled": True, "blockxsize": 512, "blockysize": 512, "interleave": "band"}
    place: dict[str, Any] = {"height": size, "width": size, "crs": "EPSG:32633", "transform": box.affine}
    with rasterio.open(folder / "s2.tif", "w", driver="GTiff", count=12, dtype="uint16", **place, **layout) as file:
        for row in range(0, size, 512):
            for col in range(0, size, 512):
                height, width = min(512, size - row), min(512, size - col)
                file.write(pixels[:, :height, :width], window=Window(col, row, width, height))
    item = make_item("s2", "sentinel2_l2a", "2023-06-01", box, {"data": str(folder / "s2.tif")})
    save_scene(folder, [item], "Noise", None)


def linear_probe(dim: int) -> Probe:
    generator = torch.Generator().manual_seed(0)
    return Probe(
        kind="logistic",
        task="classes",
        classes=tuple(ProbeClass(name=f"class {i}", code=i + 1, colour=(20 * i, 90, 90)) for i in range(10)),
        tensors={
            "mean": torch.zeros(dim),
            "scale": torch.ones(dim),
            "weight": torch.randn(dim, 10, generator=generator),
            "bias": torch.zeros(10),
        },
    )


def run(case: str, folder: Path, model: str | None, patch_m: float) -> dict[str, Any]:
    """Map the scene of a folder once and say what it took."""
    encoder: Encoder = load_model(model, random=0) if model else BandMeans()
    windows = 0

    def count(done: int, total: int) -> None:
        nonlocal windows
        windows = total

    began = time.perf_counter()
    out = folder.with_name(f"{folder.name}-{encoder.name}.tif")
    result = make_map(
        folder, linear_probe(encoder.dim), out, model=encoder, patch_m=patch_m, overwrite=True, progress=count
    )
    seconds = time.perf_counter() - began
    return {
        "case": case,
        "encoder": encoder.name,
        "patch_m": patch_m,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "encoder_share": round(result.encoder_seconds / seconds, 3),
        "windows_per_s": round(windows / seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "wh": round(result.energy.kwh * 1000, 3),
        "energy": result.energy.method,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmoearth-v1.2-nano", help="released architecture, with random weights")
    parser.add_argument("--share-px", type=int, default=1024, help="scene for the encoder's share; 0 leaves it out")
    parser.add_argument("--memory-px", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--patch-m", type=float, default=40)
    args = parser.parse_args()
    cases = [(f"share {args.share_px} px", args.share_px, args.model)] if args.share_px else []
    cases += [(f"memory {size} px", size, None) for size in args.memory_px]
    with tempfile.TemporaryDirectory() as temporary:
        peaks = []
        for case, size, model in cases:
            folder = Path(temporary) / f"scene{size}"
            if not folder.exists():
                write_scene(folder, size)
            with mp.get_context("spawn").Pool(1) as pool:
                line = pool.apply(run, (case, folder, model, args.patch_m))
            print(json.dumps(line), flush=True)
            peaks += [line["peak_mb"]] if model is None else []
        if len(peaks) > 1:
            print(json.dumps({"case": "memory, largest scene over smallest", "ratio": round(peaks[-1] / peaks[0], 3)}))


if __name__ == "__main__":
    main()
