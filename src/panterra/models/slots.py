"""Several sensors' dates on one time axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from panterra.modalities import MODALITIES
from panterra.sample import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """Observations whose t-th image belongs to the t-th timestamp; series share one T, maps have T = 1."""

    observations: dict[str, Observation]
    timestamps: Int[Tensor, "b t 3"]
    """Day 1-31, month 0-11, year."""


def align(observations: Mapping[str, Observation], *, tolerance_days: int) -> Aligned:
    """Put the series of several modalities onto one axis per sample, leaving slots without an image invalid.

    Images of different modalities share a slot when they lie within `tolerance_days` of its first date; two images of
    one modality never do. A slot carries its first date. Each sample is aligned by its own dates alone.
    """
    series = {m: o for m, o in observations.items() if MODALITIES[m].kind in ("series", "weather")}
    if not series:
        first = next(iter(observations.values())).dates[:, :1]
        return Aligned(observations=dict(observations), timestamps=to_timestamps(first))
    if _already_aligned(series):
        return Aligned(observations=dict(observations), timestamps=to_timestamps(next(iter(series.values())).dates))
    size = len(next(iter(series.values())).pixels)
    plans = [_plan({m: _sample_dates(o, i) for m, o in series.items()}, tolerance_days) for i in range(size)]
    length = max(1, *(len(plan.days) for plan in plans))
    days = torch.tensor([_pad(plan.days, length) for plan in plans], dtype=torch.int64)
    placed = {m: _place(o, [plan.source[m] for plan in plans], length) for m, o in series.items()}
    device = next(iter(series.values())).dates.device
    return Aligned(
        observations={m: placed.get(m, o) for m, o in observations.items()}, timestamps=to_timestamps(days.to(device))
    )


def to_timestamps(days: Int[Tensor, "b t"]) -> Int[Tensor, "b t 3"]:
    """Split days since 1970-01-01 into day 1-31, month 0-11 and year."""
    date = days.cpu().numpy().astype("datetime64[D]")
    months = date.astype("datetime64[M]")
    parts = [
        (date - months).astype(np.int64) + 1,
        months.astype(np.int64) % 12,
        date.astype("datetime64[Y]").astype(np.int64) + 1970,
    ]
    return torch.from_numpy(np.stack(parts, axis=-1)).to(days.device)


@dataclass(frozen=True, slots=True)
class _Plan:
    days: list[int]
    source: dict[str, list[int]]
    """For each slot the index of the modality's image, or -1."""


def _already_aligned(series: Mapping[str, Observation]) -> bool:
    first, *others = (o.dates for o in series.values())
    if any(not torch.equal(first, other) for other in others):
        return False
    return bool((first[:, 1:] > first[:, :-1]).all())


def _sample_dates(o: Observation, i: int) -> list[tuple[int, int]]:
    """List (day, index) of the images of one sample in order of time, without padding.

    Padding repeats the last date and holds no data; a modality without any data takes no part.
    """
    has_data = o.valid[i].flatten(1).any(1).tolist()
    if not any(has_data):
        return []
    dates = o.dates[i].tolist()
    real = {day for day, some in zip(dates, has_data, strict=True) if some}
    kept: list[tuple[int, int]] = []
    for index, (day, some) in enumerate(zip(dates, has_data, strict=True)):
        if some or day not in real:
            kept.append((day, index))
            real.add(day)
    return sorted(kept)


def _plan(dates: Mapping[str, list[tuple[int, int]]], tolerance: int) -> _Plan:
    events = sorted((day, order, m, index) for order, m in enumerate(dates) for day, index in dates[m])
    slots: list[tuple[int, dict[str, int]]] = []
    for day, _, m, index in events:
        if slots and m not in slots[-1][1] and day - slots[-1][0] <= tolerance:
            slots[-1][1][m] = index
        else:
            slots.append((day, {m: index}))
    return _Plan([day for day, _ in slots], {m: [slot.get(m, -1) for _, slot in slots] for m in dates})


def _pad(days: list[int], length: int) -> list[int]:
    return days + [days[-1] if days else 0] * (length - len(days))


def _place(o: Observation, source: list[list[int]], length: int) -> Observation:
    index = torch.tensor([row + [-1] * (length - len(row)) for row in source], device=o.pixels.device)
    sample = torch.arange(len(index), device=index.device)[:, None]
    there = index >= 0
    index = index.clamp(min=0)
    return Observation(
        pixels=o.pixels[sample, index],
        dates=o.dates[sample, index],
        valid=o.valid[sample, index] & there[:, :, None, None],
    )
