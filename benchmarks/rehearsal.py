"""A country in rehearsal: a large scene in two UTM zones, embedded by a job that is killed again and again.

    python benchmarks/rehearsal.py --px 20480 --minutes 60 --kills 10

The scene shows one piece of the procedural planet over and over, as virtual rasters, so that 400 million pixels of
three sensors and four dates take a gigabyte of disk; the eastern half lies in another zone. One job is killed with
SIGKILL at random moments and started again; another, on the other core, is left alone. After `--minutes` both are
stopped, and every finished tile of the one is compared with that of the other, byte by byte. One JSON line per start
with its peak memory, one at the end. With `--kills 0` there is only the job that is left alone, and a line per minute
with its memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.warp import transform

from panterra.imagery.stac import make_item, save_scene
from panterra.planet import Planet

DATES = ("2023-04-28", "2023-06-09", "2023-07-22", "2023-09-14")
SENSORS = {"sentinel2_l2a": ("uint16", 0.0), "sentinel1": ("float32", float("nan")), "landsat": ("uint16", 0.0)}
ZONES = ("EPSG:32633", "EPSG:32634")


def write_scene(folder: Path, px: int, piece_px: int) -> Path:
    """Write the pieces once, and a virtual raster of each place, date and sensor that shows them."""
    folder.mkdir(parents=True)
    ground = (planet := Planet(seed=5)).ground(at(ZONES[0], 690_000, 5_300_000, piece_px))
    files = {}
    for sensor, (dtype, nodata) in SENSORS.items():
        for date in DATES:
            pixels, valid = planet.observe(sensor, ground, date)
            pixels = np.where(valid, pixels, nodata).astype(dtype)
            files[sensor, date] = folder / f"{sensor}_{date}.tif"
            layout: dict[str, Any] = {"tiled": True, "blockxsize": 512, "blockysize": 512, "nodata": nodata}
            size: dict[str, Any] = {"height": piece_px, "width": piece_px, "count": len(pixels), "dtype": dtype}
            with rasterio.open(files[sensor, date], "w", driver="GTiff", **size, **layout) as file:
                file.write(pixels)
    number, items = px // piece_px, []
    side = 10 * piece_px
    left, top = 750_000 - side * (number // 2), 5_300_000
    (x,), (y,) = transform(ZONES[0], ZONES[1], [750_000], [top])
    for row in range(number):
        for col in range(number):
            half = col - number // 2
            here = (ZONES[0], left + side * col) if half < 0 else (ZONES[1], round(x, -1) + side * half)
            box = at(here[0], here[1], (top if half < 0 else round(y, -1)) - side * row, piece_px)
            for (sensor, date), path in files.items():
                view = folder / "views" / f"{sensor}_{date}_{row}_{col}.vrt"
                write_view(view, path, box)
                items.append(make_item(view.stem, sensor, date, box, {"data": view}))
    save_scene(folder, items, "A rehearsal", None)
    return folder


def at(crs: str, left: float, top: float, px: int) -> GeoBox:
    return GeoBox((px, px), Affine(10, 0, left, 0, -10, top), crs)


def write_view(view: Path, path: Path, box: GeoBox) -> None:
    """Write a virtual raster that shows a file at another place."""
    view.parent.mkdir(exist_ok=True)
    with rasterio.open(path) as file:
        kind = {"uint16": "UInt16", "float32": "Float32"}[file.dtypes[0]]
        bands = "".join(
            f'<VRTRasterBand dataType="{kind}" band="{i}"><NoDataValue>{file.nodata}</NoDataValue><SimpleSource>'
            f'<SourceFilename relativeToVRT="1">../{path.name}</SourceFilename><SourceBand>{i}</SourceBand>'
            "</SimpleSource></VRTRasterBand>"
            for i in range(1, file.count + 1)
        )
    a = box.affine
    view.write_text(
        f'<VRTDataset rasterXSize="{box.width}" rasterYSize="{box.height}"><SRS>{box.crs}</SRS>'
        f"<GeoTransform>{a.c}, {a.a}, {a.b}, {a.f}, {a.d}, {a.e}</GeoTransform>{bands}</VRTDataset>"
    )


def start(scene: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["embed", str(scene), "--model", "olmoearth-v1.2-nano", "--random", "0", "--out", str(out)]
    words += ["--patch-m", "40", "--dtype", "int8", "--tile-px", "256"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PANTERRA_LEDGER": "off"}
    return subprocess.Popen([sys.executable, "-m", "panterra", *words], env=environment, **quiet)  # type: ignore[call-overload,no-any-return]


def memory_mb(process: subprocess.Popen[bytes], key: str = "VmHWM") -> float:
    """Give the peak resident memory of a running process so far, or with `VmRSS` what is resident now."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(key)), 0.0)


def finished(out: Path) -> dict[str, str]:
    """Give the checksum of every shard that a job has written."""
    shards = (out.with_name(f"{out.name}.parts") / "store" / "embeddings" / "c").rglob("*")
    return {
        str(path.relative_to(out.with_name(f"{out.name}.parts"))): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in shards
        if path.is_file() and not path.name.endswith((".tmp", ".partial"))
    }


def watch(job: subprocess.Popen[bytes], out: Path, end: float) -> None:
    """Tell every minute what memory a job takes, until it is done or the time is over."""
    began = time.monotonic()
    while time.monotonic() < end and job.poll() is None:
        time.sleep(60)
        told = {"minutes": round((time.monotonic() - began) / 60), "shards": len(finished(out))}
        told |= {"mb": round(memory_mb(job, "VmRSS")), "peak_mb": round(memory_mb(job))}
        print(json.dumps(told), flush=True)
    job.send_signal(signal.SIGKILL)
    job.wait()


def run(work: Path, px: int, piece_px: int, minutes: float, kills: int, seed: int) -> None:
    began = time.monotonic()
    scene = work / "scene"
    if not (scene / "scene.json").is_file():
        write_scene(scene, px, piece_px)
    print(json.dumps({"scene_px": px, "seconds_to_make": round(time.monotonic() - began, 1)}), flush=True)
    rng, end = random.Random(seed), time.monotonic() + 60 * minutes
    calm = start(scene, work / "calm.zarr")
    if not kills:
        watch(calm, work / "calm.zarr", end)
        return
    memory = []
    for life in range(kills + 1):
        process, born = start(scene, work / "killed.zarr"), time.monotonic()
        left = (end - time.monotonic()) / (kills + 1 - life)
        death, peak = born + left * (rng.uniform(0.5, 1.5) if life < kills else 1.0), 0.0
        while time.monotonic() < min(death, end) and process.poll() is None:
            peak = max(peak, memory_mb(process))
            time.sleep(0.2)
        calm_peak = memory_mb(calm)
        process.send_signal(signal.SIGKILL)
        process.wait()
        memory.append(peak)
        told = {"life": life, "seconds": round(time.monotonic() - born, 1), "peak_mb": round(peak)}
        print(
            json.dumps({**told, "shards": len(finished(work / "killed.zarr")), "calm_peak_mb": round(calm_peak)}),
            flush=True,
        )
    calm.send_signal(signal.SIGKILL)
    calm.wait()
    one, other = finished(work / "killed.zarr"), finished(work / "calm.zarr")
    both = one.keys() & other.keys()
    print(
        json.dumps(
            {
                "kills": kills,
                "shards_killed": len(one),
                "shards_calm": len(other),
                "compared": len(both),
                "different": sum(one[name] != other[name] for name in both),
                "peak_mb_first_and_last": [round(memory[0]), round(memory[-1])],
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=20480)
    parser.add_argument("--piece-px", type=int, default=2048)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(args.work or Path(folder), args.px, args.piece_px, args.minutes, args.kills, args.seed)
