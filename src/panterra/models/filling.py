"""Batches filled up to whole patches."""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F

from panterra.modalities import MODALITIES
from panterra.sample import Batch, Observation


def ground_m(batch: Batch) -> tuple[float, float]:
    """Measure the height and width of a batch in metres, by the modality with most pixels."""
    height, width, name = max((*o.pixels.shape[-2:], name) for name, o in batch.observations.items())
    # A modality finer than 10 m has more pixels than the common grid, a coarser one at most as many.
    pixel_m = batch.pixel_m * min(MODALITIES[name].gsd, 10.0) / 10
    return height * pixel_m, width * pixel_m


def fill_up(batch: Batch, *, patch_m: float) -> Batch:
    """Add missing pixels at the bottom and on the right, up to whole patches."""
    sides = ground_m(batch)
    grow = [math.ceil(side / patch_m - 1e-6) * patch_m / side for side in sides]
    if max(grow) < 1 + 1e-6:
        return batch
    filled = {}
    for name, o in batch.observations.items():
        down, right = (round(n * g) - n for n, g in zip(o.pixels.shape[-2:], grow, strict=True))
        if o.pixels.shape[-2:] == (1, 1):
            down = right = 0
        edges = (0, right, 0, down)
        filled[name] = Observation(pixels=F.pad(o.pixels, edges), dates=o.dates, valid=F.pad(o.valid, edges))
    return replace(batch, observations=filled)
