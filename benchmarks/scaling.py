"""What several workers bring to one map: measured on this machine, and simulated for a thousand.

    python benchmarks/scaling.py                                # one process, then 1 and 2 workers
    python benchmarks/scaling.py --simulate --figure scale.png  # the plan for 1000, from tile times measured first
    python benchmarks/scaling.py --simulate --tiles tiles.json  # from tile times measured before

One JSON line per case. `windows_per_s` leaves out the start of the workers: it counts from the first tile that is
done. `driver_s_per_tile` is processor time of the process that blends and writes. The simulation gives the tiles, in
order, to whichever worker is free first; a tile may start when the one `in_flight` tiles before it is written.
"""

from __future__ import annotations

import argparse
import heapq
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panterra.imagery.stac import open_scene
from panterra.mapping.cluster import in_flight
from panterra.mapping.run import embed
from panterra.mapping.sources import Encoding
from panterra.models.weights import load_model
from panterra.planet import write_planet_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A map to be made by many workers."""

    tiles: int
    workers: int
    tile_s: tuple[float, ...]
    """Measured times to compute a tile, from which the simulation draws."""
    driver_s: float
    """To blend and write a tile, one after the other."""
    drivers: int = 1
    """Sub-areas with a driver each, which share the workers evenly."""
    result_mb: float = 1.0
    """What a computed tile takes in the driver's memory until it is written."""
    tile_mb: float = 0.0
    """What is read for a tile."""
    worker_mb_per_s: float = float("inf")
    total_mb_per_s: float = float("inf")
    """What the storage gives to all workers together."""
    stragglers: float = 0.0
    """The share of tiles that take `straggler_factor` times as long."""
    straggler_factor: float = 10.0
    deaths_per_hour: float = 0.0
    """Of a worker, by preemption or failure; the tile in work is lost."""
    restart_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a plan went."""

    seconds: float
    efficiency: float
    """The time that the workers' tiles take, without any trouble, as a share of what all workers were there."""
    driver_share: float
    """How much of the time the busiest driver worked."""
    lost_share: float
    """Computed and thrown away, as a share of the useful work."""
    read_gb: float
    deaths: int


def simulate(plan: Plan, seed: int = 0) -> Outcome:
    """Play a plan through; sub-areas run beside each other, and the last one decides."""
    parts = []
    for number in range(plan.drivers):
        tiles = plan.tiles // plan.drivers + (number < plan.tiles % plan.drivers)
        workers = plan.workers // plan.drivers + (number < plan.workers % plan.drivers)
        shared = plan.total_mb_per_s * workers / plan.workers
        one = replace(plan, tiles=tiles, workers=workers, drivers=1, total_mb_per_s=shared)
        parts.append(_simulate_one(one, np.random.default_rng((seed, number))))
    seconds = max(part[0] for part in parts)
    useful, lost, reads, deaths = (sum(part[i] for part in parts) for i in (1, 2, 3, 4))
    return Outcome(
        seconds=seconds,
        efficiency=useful / (seconds * plan.workers),
        driver_share=-(-plan.tiles // plan.drivers) * plan.driver_s / seconds,
        lost_share=lost / useful,
        read_gb=reads * plan.tile_mb / 1000,
        deaths=int(deaths),
    )


def _simulate_one(plan: Plan, rng: np.random.Generator) -> tuple[float, float, float, int, int]:
    """Return the end, the useful and the lost work in seconds, reads and deaths of one driver's tiles."""
    compute = rng.choice(np.asarray(plan.tile_s), plan.tiles)
    slow = np.where(rng.random(plan.tiles) < plan.stragglers, plan.straggler_factor, 1.0)
    read = plan.tile_mb / min(plan.worker_mb_per_s, plan.total_mb_per_s / plan.workers)
    free = [0.0] * plan.workers
    written: list[float] = []
    ahead, lost, reads, deaths = in_flight(plan.workers, plan.result_mb * 1e6), 0.0, 0, 0
    for tile in range(plan.tiles):
        earliest = written[tile - ahead] if tile >= ahead else 0.0
        while True:
            start = max(heapq.heappop(free), earliest)
            takes = compute[tile] * slow[tile] + read
            reads += 1
            lives = rng.exponential(3600 / plan.deaths_per_hour) if plan.deaths_per_hour else float("inf")
            if lives >= takes:
                heapq.heappush(free, start + takes)
                break
            deaths, lost, earliest = deaths + 1, lost + lives, start + lives
            heapq.heappush(free, start + lives + plan.restart_s)
        written.append(max(written[-1] if written else 0.0, start + takes) + plan.driver_s)
    return written[-1], float((compute + read).sum()), lost, reads, deaths


def best_drivers(plan: Plan) -> int:
    """Return how many drivers keep up with the workers, each busy for two thirds of the time at most."""
    read = plan.tile_mb / min(plan.worker_mb_per_s, plan.total_mb_per_s / plan.workers)
    tiles_per_s = plan.workers / (float(np.mean(plan.tile_s)) + read)
    return max(1, int(np.ceil(tiles_per_s * plan.driver_s * 1.5)))


def measure(px: int, tile_px: int, folder: Path) -> list[dict[str, Any]]:
    """Embed a planet in one process, and with 1 and 2 workers."""
    torch.set_num_threads(1)
    scene = write_planet_scene(folder / "scene", size_px=px, dates=("2023-06-09", "2023-07-22"), labels=10)
    rows = []
    for on in ("local", "processes:1", "processes:2"):
        seen: list[tuple[float, int]] = []
        began, busy = time.perf_counter(), time.process_time()
        embed(
            scene,
            load_model("olmoearth-v1.2-nano", random=0),
            folder / f"{on.replace(':', '-')}.zarr",
            tile_px=tile_px,
            on=on,
            progress=lambda done, total, seen=seen: seen.append((time.perf_counter(), done)),  # type: ignore[misc]
        )
        (first, before), (last, after) = next(entry for entry in seen if entry[1]), seen[-1]
        tiles = (-(-px // tile_px)) ** 2
        rows.append(
            {
                "case": on,
                "tiles": tiles,
                "seconds": round(time.perf_counter() - began, 2),
                "windows_per_s": round((after - before) / max(last - first, 1e-9), 2),
                **({"driver_s_per_tile": round((time.process_time() - busy) / tiles, 3)} if on != "local" else {}),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_tiles(px: int, tile_px: int, folder: Path) -> list[float]:
    """Time each tile of a planet, one after the other."""
    torch.set_num_threads(1)
    scene = open_scene(write_planet_scene(folder / "tiles", size_px=px, dates=("2023-06-09", "2023-07-22"), labels=10))
    work = Encoding.plan(
        scene,
        load_model("olmoearth-v1.2-nano", random=0),
        box=scene.geobox(),
        patch_m=40,
        modalities=None,
        window_px=64,
        overlap_px=16,
        tile_px=tile_px,
        batch_windows=8,
        workers=1,
    )
    seconds = []
    for tile in work.tiles():
        began = time.perf_counter()
        work.canvas(tile)
        seconds.append(time.perf_counter() - began)
    return seconds


def cases(plan: Plan, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Simulate a plan with different numbers of workers, with one driver and with as many as it takes."""
    rows = []
    for workers in counts:
        some = replace(plan, workers=workers)
        for drivers in sorted({1, best_drivers(some)}):
            outcome = simulate(replace(some, drivers=drivers))
            rows.append(
                {
                    "workers": workers,
                    "drivers": drivers,
                    "hours": round(outcome.seconds / 3600, 3),
                    "efficiency": round(outcome.efficiency, 3),
                    "driver_share": round(outcome.driver_share, 3),
                    "lost_share": round(outcome.lost_share, 4),
                    "read_gb": round(outcome.read_gb),
                    "deaths": outcome.deaths,
                }
            )
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw wall time and efficiency against the number of workers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    one = [row for row in rows if row["drivers"] == 1]
    many = [max((r for r in rows if r["workers"] == row["workers"]), key=lambda r: r["drivers"]) for row in one]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    counts = [row["workers"] for row in one]
    left.loglog(counts, [one[0]["hours"] * counts[0] / n for n in counts], "k:", label="linear")
    for axis, key in ((left, "hours"), (right, "efficiency")):
        axis.plot(counts, [row[key] for row in one], "o-", label="one driver")
        axis.plot(counts, [row[key] for row in many], "s--", label="as many drivers as needed")
        axis.set(xlabel="workers", ylabel="wall time, hours" if key == "hours" else "efficiency")
    right.set(xscale="log", ylim=(0, 1.05))
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=384, help="side of the measured scene")
    parser.add_argument("--tile-px", type=int, default=96)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--tiles", type=Path, help="JSON list of seconds per tile; written where it does not exist")
    parser.add_argument("--count", type=int, default=50_000, help="tiles of the simulated map")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 300, 1000, 3000])
    parser.add_argument("--driver-s", type=float, default=0.05, help="processor seconds of the driver per tile")
    parser.add_argument("--result-mb", type=float, default=1.6, help="of a computed tile in the driver's memory")
    parser.add_argument("--tile-mb", type=float, default=10.0)
    parser.add_argument("--worker-mb-per-s", type=float, default=50.0)
    parser.add_argument("--total-mb-per-s", type=float, default=5000.0)
    parser.add_argument("--stragglers", type=float, default=0.01)
    parser.add_argument("--deaths-per-hour", type=float, default=0.05)
    parser.add_argument("--price-per-gb", type=float, help="of reading, in your provider's currency")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="panterra-scaling-") as name:
        if not args.simulate:
            measure(args.px, args.tile_px, Path(name))
            return
        if args.tiles and args.tiles.is_file():
            tile_s = json.loads(args.tiles.read_text(encoding="utf-8"))
        else:
            tile_s = measure_tiles(args.px, args.tile_px, Path(name))
            if args.tiles:
                args.tiles.write_text(json.dumps(tile_s), encoding="utf-8")
    plan = Plan(
        tiles=args.count,
        workers=1,
        tile_s=tuple(tile_s),
        driver_s=args.driver_s,
        result_mb=args.result_mb,
        tile_mb=args.tile_mb,
        worker_mb_per_s=args.worker_mb_per_s,
        total_mb_per_s=args.total_mb_per_s,
        stragglers=args.stragglers,
        deaths_per_hour=args.deaths_per_hour,
    )
    rows = cases(plan, args.workers)
    for row in rows:
        cost = {} if args.price_per_gb is None else {"egress": round(row["read_gb"] * args.price_per_gb, 2)}
        print(json.dumps({**row, **cost}))
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
