"""What exports are compared on and what ranges are fitted to: windows of the planet, or of what people have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from torch import Tensor

from panterra.modalities import MODALITIES
from panterra.models.anysat import AnySat
from panterra.models.anysat_statistics import Moments
from panterra.models.exported import Signature, prepare
from panterra.models.olmoearth import OlmoEarth
from panterra.models.weights import Model
from panterra.planet import CRS, SENSORS, Planet
from panterra.sample import Batch, Observation, collate, to_date

SAMPLES = 4
"""How many samples an export is compared on: as imaged, with holes, with dates and a modality absent, without data."""
CALIBRATION = 16
"""How many windows ranges are fitted to, of the planet as many more as it takes to have PIXELS."""
PIXELS = 64
Lack = Literal["nothing", "pixels", "a date and a modality", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Images that ranges are fitted to, in windows of the export's size."""

    source: str
    """Where they are from, for the record."""
    batches: Iterable[Batch]


def planet_samples(signature: Signature) -> Batch:
    """Image the planet as an export takes it: once as it is, once with holes, once with less, once without any data.

    Of a modality that the planet does not show, pixels are drawn from what is plausible.
    """
    samples = (_look(signature, place) for place in range(SAMPLES))
    lacks: tuple[Lack, ...] = ("nothing", "pixels", "a date and a modality", "all")
    return collate([_lacking(x, lack, signature.modalities[-1]) for x, lack in zip(samples, lacks, strict=True)])


def _lacking(batch: Batch, lack: Lack, modality: str) -> Batch:
    """Mark as missing what samples are to lack; a modality only where it is not the only one."""
    observations = {}
    for m, o in batch.observations.items():
        valid = o.valid.clone()
        height, width = valid.shape[-2:]
        if lack == "pixels":
            valid[:, 0, : height // 3], valid[:, -1, :, width // 2 :] = False, False
        elif lack == "a date and a modality":
            valid[:, -1] = False
            valid &= m != modality or len(batch.observations) == 1
        elif lack == "all":
            valid[:] = False
        observations[m] = replace(o, pixels=torch.where(valid[:, :, None], o.pixels, torch.nan), valid=valid)
    return replace(batch, observations=observations)


def _look(signature: Signature, place: int) -> Batch:
    planet, generator = Planet(seed=7, clouds=0.2), torch.Generator().manual_seed(place)
    observations = {}
    for order, m in enumerate(signature.modalities):
        t, c, h, w = signature.shape(m)
        # Two sensors rarely look on one day: some of their images share a slot of the time axis, and some do not.
        days = [19480 + 365 * i // t + (3 + 17 * place) * order for i in range(t)]
        pixel = signature.window_px * signature.pixel_m / h
        if m in SENSORS:
            ground = planet.ground(GeoBox((h, w), Affine(pixel, 0, 460000 + 20000 * place, 0, -pixel, 5295740), CRS))
            images = [planet.observe(m, ground, to_date(day)) for day in days]
            pixels, valid = (torch.from_numpy(np.stack(parts)) for parts in zip(*images, strict=True))
        else:
            low, high = MODALITIES[m].plausible or (0.0, 1.0)
            pixels = low + (high - low) * torch.rand(t, c, h, w, generator=generator)
            valid = torch.ones(t, h, w, dtype=torch.bool)
        observations[m] = Observation(pixels=pixels[None].float(), dates=torch.tensor([days]), valid=valid[None])
    return Batch(observations=observations, pixel_m=signature.pixel_m)


def _planet(model: Model, signature: Signature) -> list[Batch]:
    """Image places that nothing is compared on, in units of the data that a model's statistics are of."""
    count = max(CALIBRATION, math.ceil(PIXELS / signature.window_px**2))
    batches = [_look(signature, place) for place in range(SAMPLES, SAMPLES + count)]
    if isinstance(model, AnySat):
        for m in signature.modalities:
            _match([batch.observations[m] for batch in batches], MODALITIES[m].band_names, model.statistics_of(m))
    return batches


def _match(seen: Sequence[Observation], bands: tuple[str, ...], wanted: Mapping[str, tuple[float, float]]) -> None:
    """Give bands the mean and standard deviation that are wanted of them."""
    moments = Moments(len(bands))
    for o in seen:
        moments.add(o.pixels, o.valid)
    found = moments.close(bands)
    for i, band in enumerate(bands):
        mean, std = wanted.get(band, (found.mean[i], found.std[i]))
        for o in seen:
            o.pixels[:, :, i] = (o.pixels[:, :, i] - found.mean[i]) / found.std[i] * std + mean


def looks(
    model: Model, signature: Signature, calibration: Calibration | None
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Give inputs to fit ranges to, as many at a time as the graph takes, and how many of them are no filling.

    Each window comes twice, once as it is and once with gaps, since other windows will have other gaps.
    """
    size = signature.batch or 1
    batches = _planet(model, signature) if calibration is None else calibration.batches
    lacks: list[tuple[Lack, str]] = [("pixels", ""), *(("a date and a modality", m) for m in signature.modalities)]
    both = (
        x for batch, lack in zip(batches, itertools.cycle(lacks), strict=False) for x in (batch, _lacking(batch, *lack))
    )
    days = model.align_days if isinstance(model, OlmoEarth) else None
    prepared = (prepare(batch, signature, align_days=days, name=model.name) for batch in both)
    waiting: dict[str, Tensor] = {}
    for inputs in prepared:
        waiting = {name: torch.cat([waiting[name], x]) if waiting else x for name, x in inputs.items()}
        while len(next(iter(waiting.values()))) >= size:
            yield {name: x[:size] for name, x in waiting.items()}, size
            waiting = {name: x[size:] for name, x in waiting.items()}
    if waiting and (held := len(next(iter(waiting.values())))):
        yield {name: x[torch.arange(size) % held] for name, x in waiting.items()}, held


def example_inputs(model: Model, signature: Signature) -> dict[str, Tensor]:
    """Image some places as the graph takes them."""
    count = signature.batch or 2  # 1 would be taken for a size that never changes
    samples = collate([_look(signature, place) for place in range(count)])
    days = model.align_days if isinstance(model, OlmoEarth) else None
    return prepare(samples, signature, align_days=days, name=model.name)
