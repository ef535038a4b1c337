"""What a model is given: pixels in declared units, their dates, which of them are data."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES

EPOCH = dt.date(1970, 1, 1)


def to_days(date: dt.date | np.datetime64 | str) -> int:
    """Count the days since 1970-01-01 of a date or an ISO string such as "2024-05-01"."""
    if isinstance(date, np.datetime64):
        date = str(date.astype("datetime64[D]"))
    if not isinstance(date, str | dt.date):
        raise InputError(f"{date!r} is not a date; write it as YYYY-MM-DD, or count whole days since 1970-01-01")
    if isinstance(date, str):
        try:
            date = dt.date.fromisoformat(date[:10])
        except ValueError:
            raise InputError(f"{date!r} is not a date; write it as YYYY-MM-DD") from None
    return (date - EPOCH).days if not isinstance(date, dt.datetime) else (date.date() - EPOCH).days


def to_date(days: int) -> dt.date:
    """Turn days since 1970-01-01 back into a date."""
    return EPOCH + dt.timedelta(days=int(days))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One modality of some samples, in the unit that `MODALITIES` declares, never normalised."""

    pixels: Tensor
    """float32 [B, T, C, H, W]; a still image has T = 1. C follows the modality's band order."""
    dates: Tensor
    """int64 [B, T], days since 1970-01-01."""
    valid: Tensor
    """bool [B, T, H, W]; True is data. What `pixels` holds elsewhere never reaches a result."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 5 or not self.pixels.is_floating_point():
            raise InputError(
                f"pixels are {_describe(self.pixels)}; wanted float32 [B, T, C, H, W]: "
                "add the missing axes (a still image has T = 1) and convert to float32"
            )
        b, t, _, h, w = self.pixels.shape
        if self.dates.shape != (b, t) or self.dates.dtype != torch.int64:
            raise InputError(
                f"dates are {_describe(self.dates)}; wanted int64 [{b}, {t}], days since 1970-01-01 (see to_days)"
            )
        if self.valid.shape != (b, t, h, w) or self.valid.dtype != torch.bool:
            raise InputError(f"valid is {_describe(self.valid)}; wanted bool [{b}, {t}, {h}, {w}], True where data")

    @classmethod
    def build(
        cls,
        pixels: np.ndarray | Tensor,
        dates: Sequence[dt.date | str | int] | dt.date | str,
        valid: np.ndarray | Tensor | None = None,
    ) -> Observation:
        """Make one sample from pixels [T, C, H, W] or [C, H, W] and as many dates; NaN pixels become invalid.

        `valid` is [T, H, W], or [H, W] for all dates.
        """
        given = torch.as_tensor(pixels)
        values = given[None] if given.ndim == 3 else given
        if values.ndim != 4 or values.is_complex() or not len(values):
            raise InputError(f"pixels are {_describe(given)}; wanted real numbers [T, C, H, W] or [C, H, W], T >= 1")
        values = values.to(torch.float32)
        if dates is None or isinstance(dates, str | dt.date):
            dates = [dates]
        if len(dates) != len(values):
            raise InputError(f"{len(values)} images came with {len(dates)} dates; give one date per image")
        days = torch.tensor(
            [int(d) if isinstance(d, int | np.integer) else to_days(d) for d in dates], dtype=torch.int64
        )
        seen = torch.isfinite(values).all(dim=1)
        if valid is not None:
            where = torch.as_tensor(valid, dtype=torch.bool)
            if where.shape not in (seen.shape, seen.shape[1:]):
                raise InputError(f"valid is {list(where.shape)}; wanted {list(seen.shape)}, True where data")
            seen = seen & where
        return cls(pixels=values[None], dates=days[None], valid=seen[None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The same B places seen by one or more modalities, all over the same ground."""

    observations: Mapping[str, Observation]
    lonlat: Tensor | None = None
    """float64 [B, 2], the centre of each sample in degrees, where known."""
    pixel_m: float = field(default=10.0)
    """Metres per pixel of the common grid; a modality that `MODALITIES` declares finer has as many more pixels."""

    def __post_init__(self) -> None:
        if not self.observations:
            raise InputError("a batch needs at least one modality; none came")
        unknown = [name for name in self.observations if name not in MODALITIES]
        if unknown:
            raise InputError(f"no modality {unknown[0]!r}; known: {', '.join(sorted(MODALITIES))}")
        if bare := [name for name, o in self.observations.items() if not isinstance(o, Observation)]:
            raise InputError(f"{bare[0]} is no Observation; make one of pixels and dates with Observation.build")
        if not 0 < self.pixel_m < math.inf:
            raise InputError(f"pixel_m is {self.pixel_m}; wanted metres per pixel, above 0")
        sizes = {name: o.pixels.shape[0] for name, o in self.observations.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"modalities differ in the number of samples: {sizes}; give the same samples to each")
        for name, o in self.observations.items():
            bands = MODALITIES[name].bands
            if o.pixels.shape[2] != len(bands):
                wanted = ", ".join(b.name for b in bands)
                raise InputError(f"{name} came with {o.pixels.shape[2]} bands; wanted {len(bands)}: {wanted}")
        if self.lonlat is not None and self.lonlat.shape != (len(self), 2):
            raise InputError(f"lonlat is {_describe(self.lonlat)}; wanted [{len(self)}, 2]")

    def __len__(self) -> int:
        return next(iter(self.observations.values())).pixels.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to a device."""
        moved = {
            name: Observation(pixels=o.pixels.to(device), dates=o.dates.to(device), valid=o.valid.to(device))
            for name, o in self.observations.items()
        }
        return replace(self, observations=moved, lonlat=None if self.lonlat is None else self.lonlat.to(device))


def collate(batches: Sequence[Batch]) -> Batch:
    """Join batches along B; shorter series and absent modalities are filled with invalid dates."""
    if not batches:
        raise InputError("nothing to collate: the list of batches is empty")
    if len({b.pixel_m for b in batches}) > 1:
        raise InputError(
            f"batches differ in pixel size ({sorted({b.pixel_m for b in batches})} m); resample them first"
        )
    names = list(dict.fromkeys(name for b in batches for name in b.observations))
    joined = {name: _join(name, batches) for name in names}
    with_place = [b.lonlat for b in batches if b.lonlat is not None]
    lonlat = torch.cat(with_place) if len(with_place) == len(batches) else None
    return Batch(observations=joined, lonlat=lonlat, pixel_m=batches[0].pixel_m)


def _join(name: str, batches: Sequence[Batch]) -> Observation:
    present = [b.observations[name] for b in batches if name in b.observations]
    sizes = {tuple(o.pixels.shape[-2:]) for o in present}
    if len(sizes) > 1:
        raise InputError(f"{name} comes in several sizes ({sorted(sizes)} px); crop the samples to one size first")
    (height, width), bands = sizes.pop(), present[0].pixels.shape[2]
    longest = max(o.pixels.shape[1] for o in present)
    total = sum(len(b) for b in batches)
    pixels = present[0].pixels.new_zeros(total, longest, bands, height, width)
    dates = present[0].dates.new_zeros(total, longest)
    valid = present[0].valid.new_zeros(total, longest, height, width)
    start = 0
    for batch in batches:
        stop = start + len(batch)
        if name in batch.observations:
            o = batch.observations[name]
            steps = o.pixels.shape[1]
            pixels[start:stop, :steps], dates[start:stop, :steps] = o.pixels, o.dates
            dates[start:stop, steps:] = o.dates[:, -1:]
            valid[start:stop, :steps] = o.valid
        start = stop
    return Observation(pixels=pixels, dates=dates, valid=valid)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
