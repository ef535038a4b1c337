"""OlmoEarth and AnySat on the same data: every number of docs/choosing.md.

    python benchmarks/choosing.py                                     # random weights, as on the page
    python benchmarks/choosing.py --model olmoearth-v1.2-nano anysat-base --seeds 0       # released weights, fetched

One JSON line per run, each in a process of its own. All features meet the same labels, blocks and probe: raw band
statistics, which use no model, encoders with random weights, which were never trained, and what `--model` names.
`cpu_seconds`, of one thread beside those that read, `windows_per_cpu_s` and `wh` count the whole job of embedding the
scene, statistics and reading included; `peak_mb` is by how much it raises the peak of a process that holds the model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panterra.evaluate.embed import raw_patch_statistics
from panterra.evaluate.metrics import Interval
from panterra.evaluate.splits import spatial_blocks
from panterra.imagery.files import scene_from_files
from panterra.imagery.labels import read_labels, sample_labels
from panterra.imagery.stac import Scene, open_scene
from panterra.mapping import run
from panterra.models.weights import load_model
from panterra.planet import write_planet_scene
from real_data import RAW, Truth, drawn_points, fit, label, patch_grid

SENSORS = ("sentinel2_l2a", "sentinel1")
ARCHITECTURES = ("olmoearth-v1.2-tiny", "anysat-tiny")
"""Both are 192 wide and 12 blocks deep; AnySat's run six inside patches and six between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A scene and its labels."""

    name: str
    scene: Scene
    labels: Path
    patch_m: float
    block_m: float


def planet(work: Path, samples: Path) -> Data:
    folder = write_planet_scene(work / "planet", size_px=192)
    labels = folder / "labels.geojson"
    return Data(name="planet", scene=open_scene(folder), labels=labels, patch_m=40, block_m=240)


def belgium(work: Path, samples: Path) -> Data:
    """Take the monthly cube of 2021, and points drawn from WorldCereal's product, as on the page about real data."""
    folder = samples / "worldcereal_cube_belgium"
    files = [folder / "s2_geotiff", folder / "s1_geotiff"]
    scene = scene_from_files(files, work / "belgium", copy=False).scene
    scene = replace(scene, items=tuple(item for item in scene.items if item.date.year == 2021))
    points = drawn_points(folder / "label_WORLDCEREAL_TEMPORARYCROPS_2021.tif", work / "points.geojson", 300)
    return Data(name="belgium", scene=scene, labels=points, patch_m=20, block_m=200)


DATA: dict[str, Callable[[Path, Path], Data]] = {"planet": planet, "belgium": belgium}


def truth_of(data: Data) -> Truth:
    _, grid = patch_grid(data.scene, data.patch_m)
    known = read_labels(data.labels)
    samples = sample_labels(known, grid)
    return Truth(
        row=samples.row,
        col=samples.col,
        target=samples.target + 1,
        group=spatial_blocks(samples.xy, data.block_m, together=samples.group),
        names=dict(enumerate(known.names, start=1)),
        colours={},
    )


def scored(data: Data, features: np.ndarray) -> dict[str, Any]:
    """Fit a probe with blocks held out in turn: estimates with 95 % intervals."""
    truth = truth_of(data)
    x = features[truth.row, truth.col]
    seen = np.isfinite(x).all(1)
    kept = {name: getattr(truth, name)[seen] for name in ("row", "col", "target", "group")}
    metrics = fit(x[seen], replace(truth, **kept))[1].metrics
    figures = {name: shown(metrics[name]) for name in ("accuracy", "macro_f1")}
    return {"samples": int(seen.sum()), "blocks": len(np.unique(kept["group"])), **figures}


def shown(interval: Interval) -> list[float]:
    return [round(value, 3) for value in (interval.estimate, interval.low, interval.high)]


def raw(data: Data) -> dict[str, Any]:
    box, _ = patch_grid(data.scene, data.patch_m)
    features = raw_patch_statistics(data.scene.batch(box, SENSORS), data.patch_m)[0]
    return {"data": data.name, "features": RAW, "dim": features.shape[-1], **scored(data, features)}


def encoded(data: Data, work: Path, model: str, seed: int | None, window_px: int) -> dict[str, Any]:
    """Embed a scene once and say what it took and what its features score."""
    torch.set_num_threads(1)
    encoder = load_model(model, random=seed)
    windows = 0

    def count(done: int, total: int) -> None:
        nonlocal windows
        windows = total

    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak anew
    before, began = status("VmRSS"), time.process_time()
    store = run.embed(
        data.scene,
        encoder,
        work / f"{data.name}-{model.rpartition('/')[2]}-{seed}.zarr",
        patch_m=data.patch_m,
        modalities=SENSORS,
        window_px=window_px,
        overlap_px=window_px // 4,
        progress=count,
    )
    cpu_seconds, peak_mb = time.process_time() - began, (status("VmHWM") - before) / 1024
    assert isinstance(encoder, torch.nn.Module)
    told = json.loads(store.passport.read_text())["properties"]
    return {
        "data": data.name,
        "features": label(encoder),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "dim": encoder.dim,
        "window_px": window_px,
        "patch_m": data.patch_m,
        "cpu_seconds": round(cpu_seconds, 1),
        "windows_per_cpu_s": round(windows / cpu_seconds, 2),
        "peak_mb": round(peak_mb),
        "wh": round(told["panterra:energy"]["kwh"] * 1000, 3),
        "energy": told["panterra:energy"]["method"],
        **scored(data, store.read()),
    }


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def jobs(data: Data, work: Path, args: argparse.Namespace) -> Iterator[Callable[[], dict[str, Any]]]:
    yield partial(raw, data)
    for model in args.model:
        yield partial(encoded, data, work, model, None, 32)
    for seed in range(args.seeds):
        for model in args.random:
            # What surrounds a patch is noise to an untrained encoder.
            yield partial(encoded, data, work, model, seed, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--model", nargs="+", default=[], help="names or folders, with their own weights")
    parser.add_argument("--random", nargs="+", default=list(ARCHITECTURES), help="architectures with random weights")
    parser.add_argument("--seeds", type=int, default=3, help="draws of random weights per architecture")
    parser.add_argument("--samples", type=Path, default=Path(os.environ.get("PANTERRA_DATA", "../shared/data")))
    args = parser.parse_args()
    for name in args.data:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            data = DATA[name](work, args.samples.resolve())
            for job in jobs(data, work, args):
                with mp.get_context("spawn").Pool(1) as pool:
                    print(json.dumps(pool.apply(job)), flush=True)


if __name__ == "__main__":
    main()
