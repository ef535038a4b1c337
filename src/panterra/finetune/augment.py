"""Other views of the same place, of which the answer is known too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from panterra.data.labelled import LabelledSample
from panterra.errors import InputError
from panterra.finetune.boxes import turn_boxes
from panterra.modalities import MODALITIES
from panterra.sample import Batch, Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How training samples are varied. Nothing here changes what a unit means: no gains, no jitter between bands."""

    turns: bool = True
    """Flips and quarter turns, of all modalities and the target together."""
    drop_dates: float = 0.1
    """Chance of each date of a series to count as missing; one with data always stays."""
    noise: float = 0.02
    """Standard deviation of what is added to measured bands, in standard deviations of each band over the data."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_dates < 1 or self.noise < 0:
            raise InputError(
                f"drop_dates is {self.drop_dates} and noise {self.noise}; wanted a chance below 1 and a size from 0"
            )


NONE = Augmentation(turns=False, drop_dates=0.0, noise=0.0)


def turn_sample(
    sample: LabelledSample, generator: torch.Generator, *, dense: bool, boxes: bool = False
) -> LabelledSample:
    """Flip and turn a sample at random, by half turns alone where it is not square.

    A `dense` target turns with it; `boxes` say that it is a list of them.
    """
    quarters, flip = (int(n) for n in torch.randint(0, 4, (2,), generator=generator))
    square = all(o.pixels.shape[-2] == o.pixels.shape[-1] for o in sample.batch.observations.values())
    quarters = quarters if square else 2 * (quarters % 2)

    def turn(x: Tensor) -> Tensor:
        x = torch.rot90(x, quarters, (-2, -1))
        return x.flip(-1) if flip % 2 else x

    if boxes:
        target = turn_boxes(sample.target, quarters, flip=bool(flip % 2))
    else:
        target = turn(sample.target) if dense else sample.target
    observations = {
        name: Observation(pixels=turn(o.pixels), dates=o.dates, valid=turn(o.valid))
        for name, o in sample.batch.observations.items()
    }
    return replace(
        sample,
        batch=replace(sample.batch, observations=observations),
        target=target,
    )


def vary(batch: Batch, generator: torch.Generator, augmentation: Augmentation, spreads: Mapping[str, Tensor]) -> Batch:
    """Leave out dates and add noise; `spreads` holds the standard deviation of each modality's bands."""
    observations = {}
    for name, o in batch.observations.items():
        spec = MODALITIES[name]
        if augmentation.drop_dates and spec.kind == "series":
            o = replace(o, valid=o.valid & _kept(o, augmentation.drop_dates, generator)[:, :, None, None])
        if augmentation.noise and spec.kind in ("series", "still") and not spec.categorical and name in spreads:
            size = augmentation.noise * spreads[name].to(o.pixels)[:, None, None]
            o = replace(o, pixels=o.pixels + size * torch.randn(o.pixels.shape, generator=generator).to(o.pixels))
        observations[name] = o
    return replace(batch, observations=observations)


def _kept(o: Observation, chance: float, generator: torch.Generator) -> Tensor:
    """Choose the dates that stay, all of them where none with data would."""
    data = o.valid.flatten(2).any(2)
    kept = torch.rand(data.shape, generator=generator).to(data.device) >= chance
    return kept | ~(kept & data).any(1, keepdim=True)
