"""Other ways to look at a labelled set: in tiles, in months, as another level of processing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from panterra.data.labelled import LabelledSample, LabelledSet
from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.sample import Batch, Observation, to_date, to_days

Corner = tuple[int, int]
"""The first row and column of a tile."""


def corners(side_px: int, tile_px: int) -> list[Corner]:
    """List the tiles of a square, column after column as in OlmoEarth's published evaluation."""
    if not 0 < tile_px <= side_px or side_px % tile_px:
        raise InputError(f"a square of {side_px} pixels cannot be cut into tiles of {tile_px}; give a divisor")
    return [(row, col) for col in range(0, side_px, tile_px) for row in range(0, side_px, tile_px)]


def cut(labelled: LabelledSet, tile_px: int, chosen: Callable[[str], Sequence[Corner]]) -> LabelledSet:
    """Cut images and labels of one grid into square tiles.

    `chosen` names the tiles of a sample by their corners. A tile is called "sample@row,col" and keeps the sample's
    longitude and latitude.
    """
    ids = [f"{id}@{row},{col}" for id in labelled.ids for row, col in chosen(id)]
    return replace(
        labelled, ids=ids, read=partial(_read_tile, _Last(labelled), tile_px), files=partial(_files_of_tile, labelled)
    )


class _Last:
    """Keeps the sample that was read last: its tiles are mostly asked for one after another."""

    def __init__(self, labelled: LabelledSet) -> None:
        self.labelled = labelled
        self.sample: LabelledSample | None = None

    def read(self, id: str) -> LabelledSample:
        sample = self.sample
        if sample is None or sample.id != id:
            self.sample = sample = self.labelled.read(id)
        return sample


def _files_of_tile(labelled: LabelledSet, id: str) -> Sequence[Path]:
    return labelled.files(id.rsplit("@", 1)[0])


def _read_tile(last: _Last, tile_px: int, id: str) -> LabelledSample:
    whole, corner = id.rsplit("@", 1)
    row, col = (int(part) for part in corner.split(","))
    sample = last.read(whole)

    def window(values: Tensor) -> Tensor:
        return values[..., row : row + tile_px, col : col + tile_px]

    observations = {
        name: Observation(pixels=window(seen.pixels), dates=seen.dates, valid=window(seen.valid))
        for name, seen in sample.batch.observations.items()
    }
    batch = Batch(observations=observations, lonlat=sample.batch.lonlat)
    return replace(sample, id=id, batch=batch, target=window(sample.target))


def monthly(labelled: LabelledSet, *, months: int = 12) -> LabelledSet:
    """Average the images of each calendar month, pixel by pixel over what is valid; keep the first `months` with any.

    A mean is dated the first of its month.
    """
    return replace(labelled, read=partial(_read_monthly, labelled, months))


def _read_monthly(labelled: LabelledSet, months: int, id: str) -> LabelledSample:
    sample = labelled.read(id)
    observations = {name: _monthly_means(seen, months) for name, seen in sample.batch.observations.items()}
    return replace(sample, batch=Batch(observations=observations, lonlat=sample.batch.lonlat))


def _monthly_means(seen: Observation, months: int) -> Observation:
    firsts = [to_days(to_date(day).replace(day=1)) for day in seen.dates[0].tolist()]
    kept = [(first, list(images)) for first, images in groupby(range(len(firsts)), key=firsts.__getitem__)][:months]
    weights = seen.valid[0].unsqueeze(1).to(seen.pixels.dtype)
    sums = torch.stack([(seen.pixels[0] * weights)[images].sum(0) for _, images in kept])
    counts = torch.stack([weights[images].sum(0) for _, images in kept])
    return Observation(
        pixels=(sums / counts.clamp(min=1))[None],
        dates=torch.tensor([[first for first, _ in kept]]),
        valid=(counts[:, 0] > 0)[None],
    )


def as_level_2a(labelled: LabelledSet) -> LabelledSet:
    """Pass top-of-atmosphere Sentinel-2 off as surface reflectance, without the cirrus band.

    OlmoEarth's published evaluation does so with EuroSAT, So2Sat and others: the model was trained on level 2A.
    """
    return replace(labelled, read=partial(_read_as_level_2a, labelled))


def _read_as_level_2a(labelled: LabelledSet, id: str) -> LabelledSample:
    sample = labelled.read(id)
    observations = dict(sample.batch.observations)
    if "sentinel2" in observations:
        observations["sentinel2_l2a"] = pass_off(observations.pop("sentinel2"), "sentinel2", "sentinel2_l2a")
    return replace(sample, batch=Batch(observations=observations, lonlat=sample.batch.lonlat))


def pass_off(seen: Observation, modality: str, name: str) -> Observation:
    """Give the bands of one modality that another has, by their names and in its order."""
    order = MODALITIES[modality].band_names
    return replace(seen, pixels=seen.pixels[:, :, [order.index(band) for band in MODALITIES[name].band_names]])
