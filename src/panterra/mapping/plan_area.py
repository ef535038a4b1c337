"""Imagery that is still to be fetched, as far as a plan needs to know it."""

from __future__ import annotations

import statistics

import torch

from panterra.energy import EnergyReport, measure_energy
from panterra.energy.impact import impact_of
from panterra.energy.ledger import Note
from panterra.errors import InputError
from panterra.imagery.items import SceneItem
from panterra.imagery.stac import Scene, modality_grid
from panterra.imagery.wish import Image, Plan
from panterra.mapping.effort import Speed, joined, spread
from panterra.mapping.sources import Encoding
from panterra.modalities import MODALITIES
from panterra.models.features import Fitted
from panterra.sample import Batch, Observation, to_days

TRIALS = 3


def scene_of(found: Plan) -> Scene:
    """Describe the scene that would be fetched: its dates and grids, without files."""
    return Scene(
        items=tuple(
            SceneItem(
                id=image.id,
                modality=image.modality,
                date=image.date,
                assets=(),
                grid=image.area.grid(image.modality),
            )
            for image in found.images
        )
    )


def stated_clear(images: list[Image]) -> float:
    """Expect how often a place is seen without clouds, from what providers state for whole images."""
    return sum(_clear_share(image) for image in images)


def _clear_share(image: Image) -> float:
    total = 0.0
    for day in image.days:
        covered = sum(candidate.covers for candidate in day)
        clear = sum(candidate.covers * (1 - candidate.cloud / 100) for candidate in day)
        total += clear / max(covered, 1.0)
    return total


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
    runs = tried[1:]
    return Speed(
        seconds=spread([run.seconds / len(batch) for run in runs]),
        kwh=joined([impact_of(run).kwh * (1 / len(batch)) for run in runs]),
        method=runs[0].method,
        runs=len(runs),
        source=f"{len(batch)} made-up windows, {len(runs)} times, measured now without reading",
        core_seconds=statistics.median(run.core_seconds for run in runs) / len(batch),
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
