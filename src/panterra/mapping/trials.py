"""How fast an encoder goes on this machine, tried out on a few windows."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from panterra.energy import EnergyReport, measure_energy
from panterra.energy.impact import impact_of
from panterra.energy.ledger import Note
from panterra.errors import InputError
from panterra.imagery.stac import modality_grid
from panterra.mapping.effort import Speed, joined, spread
from panterra.mapping.run import embed
from panterra.mapping.sources import Encoding
from panterra.mapping.tiles import Window
from panterra.modalities import MODALITIES
from panterra.models.features import Fitted
from panterra.sample import Batch, Observation, to_days

SHARES = (0.5, 0.25, 0.5, 0.75)
"""Where a few windows are tried, by the share of tiles before them."""
TRIALS = 3
"""How often made-up windows are tried, besides once for warming up."""
PATIENCE_S = 60.0


def measure_speed(work: Encoding, *, country: str | None = None, note: Note | None = None) -> Speed:
    """Embed a few windows at some places of the area, as a run would, and say what a window took.

    The first place is for warming up; it counts alone where it took longer than `PATIENCE_S`.
    """
    if note:
        note(f"measuring: a few windows go through {work.encoder.name}, at {len(SHARES) - 1} places of the area")
    tried: list[EnergyReport] = []
    with tempfile.TemporaryDirectory(prefix="panterra-plan-") as folder:
        for number, block in enumerate(_places(work)):
            store = embed(
                work.scene,
                work.encoder,
                Path(folder) / f"block{number}.zarr",
                box=work.box[block.scaled(work.patch_px).slices],
                patch_m=work.patch_m,
                modalities=work.modalities,
                window_px=work.about["window_px"],
                overlap_px=work.about["overlap_px"],
                batch_windows=work.batch_windows,
                workers=work.workers,
                country=country,
            )
            height, width = store.box.shape
            if np.isfinite(store.read(Window(row=0, col=0, height=height, width=width))).any():
                told = json.loads(store.passport.read_text(encoding="utf-8"))["properties"]
                tried.append(EnergyReport.of(told["panterra:energy"]))
                if tried[-1].seconds > PATIENCE_S:
                    break
    if not tried:
        raise InputError(
            "nothing can be measured: the area has no data in its middle; embed a part that has some first"
        )
    windows, places = math.prod(_block_windows(work)), len(tried[1:] or tried)
    return _speed_of(tried, windows, f"{windows} windows at each of {places} places, measured now")


def _block_windows(work: Encoding) -> tuple[int, int]:
    """Return how many windows, down and across, are tried at a place: a batch, where the area has as many."""
    down = min(math.isqrt(work.batch_windows), work.lattice.rows.num_windows)
    return down, min(work.batch_windows // down, work.lattice.cols.num_windows)


def _places(work: Encoding) -> list[Window]:
    """Place batches of windows where there may be something to map, in patches."""
    tiles = [(tile.row, tile.col) for tile in work.tiles() if work.cost(tile)]
    if not tiles:
        raise InputError("nothing can be measured, as no image shows the area; wanted an area that meets the scene")
    rows, cols = work.lattice.rows, work.lattice.cols
    height, width = (
        min(axis.window + (number - 1) * axis.stride, axis.size)
        for axis, number in zip((rows, cols), _block_windows(work), strict=True)
    )
    places = []
    for share in SHARES:
        windows = work.coverage.windows(work.lattice.tile(*tiles[int(share * (len(tiles) - 1))]))
        middle = windows[len(windows) // 2]
        row, col = min(middle.row, rows.size - height), min(middle.col, cols.size - width)
        places.append(Window(row=row, col=col, height=height, width=width))
    return places


def try_pixels(work: Encoding, *, country: str | None = None, note: Note | None = None) -> Speed:
    """Put batches of made-up windows through the encoder; reading and writing are not in it."""
    if isinstance(work.encoder, Fitted) and work.encoder.missing_statistics(work.modalities):
        raise InputError(
            f"no earlier run tells the speed of {work.encoder.name}, and it needs statistics of imagery that is not "
            "here yet; plan with a scene, or embed one"
        )
    if note:
        note(f"measuring: made-up windows go through {work.encoder.name}; reading is not in it")
    batch = _made_up(work)
    tried: list[EnergyReport] = []
    for _ in range(1 + TRIALS):
        with measure_energy(country=country) as meter, torch.inference_mode():
            work.encoder.encode(batch, patch_m=work.patch_m).patches.cpu()
        tried.append(meter.report)
    return _speed_of(tried, len(batch), f"{len(batch)} made-up windows, {TRIALS} times, measured now without reading")


def _speed_of(tried: Sequence[EnergyReport], windows: int, source: str) -> Speed:
    """Say what a window takes by trials of so many each; the first was for warming up, unless it is the only one."""
    runs = tried[1:] or tried
    return Speed(
        seconds=spread([run.seconds / windows for run in runs]),
        kwh=joined([impact_of(run).kwh * (1 / windows) for run in runs]),
        method=runs[0].method,
        runs=len(runs),
        source=source,
        core_seconds=statistics.median(run.core_seconds for run in runs) / windows,
        peak_memory_gb=max(run.peak_memory_gb for run in runs),
    )


def _made_up(work: Encoding) -> Batch:
    rows, cols = (size * work.patch_px for size in work.lattice.window_shape)
    count = min(work.batch_windows, work.lattice.num_windows)
    generator = torch.Generator().manual_seed(0)
    observations = {}
    for spec in (MODALITIES[name] for name in work.modalities):
        days = [to_days(date) for date in work.scene.dates(spec.name)]
        height, width = modality_grid(spec, work.box[:rows, :cols]).shape
        shape = (count, len(days), len(spec.bands), height, width)
        observations[spec.name] = Observation(
            pixels=torch.rand(shape, generator=generator) * 1000,
            dates=torch.tensor([days] * count, dtype=torch.int64),
            valid=torch.ones((count, len(days), height, width), dtype=torch.bool),
        )
    return Batch(
        observations=observations,
        lonlat=torch.zeros(count, 2, dtype=torch.float64),
        pixel_m=work.patch_m / work.patch_px,
    ).to(work.device)
