"""From declared units to the numbers that a network was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.adapters.declaration import Input, Takes
from panterra.sample import Batch, Observation

Statistics = Mapping[str, Mapping[str, Any]]
"""By modality: `bands`, `mean` and `std` of the values after scale, offset and clip, as plain JSON."""


def grid_of(batch: Batch, patch_m: float) -> tuple[int, int]:
    """Count the rows and columns of patches that a batch covers. Raises InputError."""
    grids = {}
    for m, o in batch.observations.items():
        # Coarser modalities stand on the common grid, finer ones have as many more pixels.
        pixel_m = batch.pixel_m * min(MODALITIES[m].gsd, 10) / 10
        sides = [n * pixel_m / patch_m for n in o.pixels.shape[-2:]]
        per_patch = patch_m / pixel_m
        if per_patch < 1 - 1e-6 or any(abs(n - round(n)) > 1e-6 for n in (*sides, per_patch)) or not all(sides):
            height, width = o.pixels.shape[-2:]
            raise InputError(
                f"{m} of {height} x {width} pixels of {pixel_m:g} m is not a whole number of patches of {patch_m:g} m, "
                "of whole pixels each; choose another patch_m, or crop it"
            )
        grids[m] = round(sides[0]), round(sides[1])
    if len(set(grids.values())) > 1:
        raise InputError(f"modalities cover different ground, in patches: {grids}; crop them to the same place")
    return next(iter(grids.values()))


def patch_valid(valid: Bool[Tensor, "b t y x"], grid: tuple[int, int]) -> Bool[Tensor, "b t h w"]:
    """Say which patches have any data."""
    return reduce(valid.byte(), "b t (h p) (w q) -> b t h w", "max", h=grid[0], w=grid[1]).bool()


def network_values(
    o: Observation, takes: Takes, modality: str, statistics: Statistics, *, normalised: bool
) -> Float[Tensor, "b t c y x"]:
    """Give an observation's bands in the network's order and unit; holes get the mean of their image's band.

    `normalised` values are only put in order.
    """
    given = takes.modalities[modality]
    seen = o.valid[:, :, None]
    x = o.pixels[:, :, given.index]
    x = torch.where(seen, x, 0.0)
    if not normalised:
        x = _in_unit(x, given)
        if takes.standardise == "image":
            x = _stretch(x, seen)
        elif takes.standardise == "data":
            x = _standardise(x, statistics[modality]["mean"], statistics[modality]["std"])
        elif given.mean:
            x = _standardise(x, given.mean, given.std)
    return torch.where(seen, x, _mean(x, seen)[0])


def band_statistics(batches: Iterable[Batch], takes: Takes) -> dict[str, dict[str, Any]]:
    """Fit `Statistics` to all that is valid in batches, in one pass."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for m, o in batch.observations.items():
            if m not in takes.modalities:
                continue
            given = takes.modalities[m]
            seen = o.valid[:, :, None]
            x = _in_unit(torch.where(seen, o.pixels[:, :, given.index], 0.0), given).double() * seen
            over = (0, 1, 3, 4)
            part = torch.stack([seen.expand_as(x).double().sum(over), x.sum(over), (x * x).sum(over)])
            sums[m] = sums[m] + part if m in sums else part
    found = {}
    for m, (count, total, square) in sums.items():
        mean = total / count.clamp(min=1)
        std = (square / count.clamp(min=1) - mean**2).clamp(min=0).sqrt()
        # A band that never changes is left at zero rather than divided by it.
        std = torch.where(std > 0, std, 1.0)
        found[m] = {"bands": list(takes.modalities[m].bands), "mean": mean.tolist(), "std": std.tolist()}
    return found


def _in_unit(x: Float[Tensor, "b t c y x"], given: Input) -> Float[Tensor, "b t c y x"]:
    scale = given.scale if isinstance(given.scale, float | int) else _column(x, given.scale)
    x = x * scale + given.offset
    return x if given.clip is None else x.clamp(*given.clip)


def _standardise(x: Float[Tensor, "b t c y x"], mean: Iterable[float], std: Iterable[float]) -> Tensor:
    return (x - _column(x, mean)) / _column(x, std)


def _column(x: Tensor, values: Iterable[float]) -> Float[Tensor, "c 1 1"]:
    return torch.tensor(list(values), dtype=x.dtype, device=x.device)[:, None, None]


def _mean(x: Float[Tensor, "b t c y x"], seen: Bool[Tensor, "b t 1 y x"]) -> tuple[Tensor, Tensor]:
    count = seen.sum((3, 4), keepdim=True).clamp(min=1)
    return torch.where(seen, x, 0.0).sum((3, 4), keepdim=True) / count, count


def _stretch(x: Float[Tensor, "b t c y x"], seen: Bool[Tensor, "b t 1 y x"]) -> Float[Tensor, "b t c y x"]:
    """Bring two standard deviations around the mean of each image's band to 0 to 1 and clip the rest."""
    mean, count = _mean(x, seen)
    variance = torch.where(seen, (x - mean) ** 2, 0.0).sum((3, 4), keepdim=True) / (count - 1).clamp(min=1)
    spread = 4 * variance.sqrt()
    return torch.where(spread > 0, (x - mean) / spread.clamp(min=1e-12) + 0.5, 0.5).clamp(0, 1)
