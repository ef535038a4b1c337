"""The same places in two periods, and what differs between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from panterra.errors import InputError
from panterra.imagery.choose import parse_dates
from panterra.imagery.stac import Scene
from panterra.modalities import MODALITIES
from panterra.models.features import Features
from panterra.sample import Batch, Observation, collate, to_days

PARTS = 3
"""How many vectors stand for a pair: before, after, and the size of their difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Periods:
    """Two spans of time, such as "2020-01/2020-12", "2021" or a day, both ends included."""

    before: str
    after: str

    def __post_init__(self) -> None:
        if parse_dates(self.before)[1] >= parse_dates(self.after)[0]:
            raise InputError(f"the period before, {self.before}, must end before the one after, {self.after}, begins")

    def narrow(self, scene: Scene) -> Scene:
        """Leave of a scene's series what lies in either period; maps and other stills stay."""
        spans = [parse_dates(text) for text in (self.before, self.after)]
        kept = tuple(
            item
            for item in scene.items
            if not _dated(item.modality) or any(first <= item.date <= last for first, last in spans)
        )
        for text, (first, last) in zip((self.before, self.after), spans, strict=True):
            if not any(_dated(item.modality) and first <= item.date <= last for item in kept):
                raise InputError(f"the scene holds no image of {text}; give a period that it covers")
        return replace(scene, items=kept)


def pair_up(batch: Batch, periods: Periods) -> Batch:
    """Turn B samples into 2 B: of each sample what was seen before, then what was seen after.

    Stills, which have no date of their own, are in both. Dates in neither period are left out.
    """
    halves = collate([_during(batch, text) for text in (periods.before, periods.after)])
    order = torch.arange(2 * len(batch)).view(2, -1).T.reshape(-1)
    observations = {
        name: Observation(pixels=o.pixels[order], dates=o.dates[order], valid=o.valid[order])
        for name, o in halves.observations.items()
    }
    lonlat = None if halves.lonlat is None else halves.lonlat[order]
    return replace(halves, observations=observations, lonlat=lonlat)


def _during(batch: Batch, text: str) -> Batch:
    first, last = (to_days(day) for day in parse_dates(text))
    seen, dated = {}, False
    for name, o in batch.observations.items():
        if not _dated(name):
            seen[name] = o
            continue
        inside = (o.dates >= first) & (o.dates <= last)
        steps = inside.any(0)
        if bool(steps.any()):
            dated = True
            valid = o.valid[:, steps] & inside[:, steps, None, None]
            seen[name] = Observation(pixels=o.pixels[:, steps], dates=o.dates[:, steps], valid=valid)
    if not dated:
        raise InputError(f"the samples hold no image of {text}; give a period that they cover")
    return replace(batch, observations=seen)


def _dated(modality: str) -> bool:
    return MODALITIES[modality].kind in ("series", "weather")


def compare(features: Features) -> Features:
    """Join the features of each pair: before, after and their absolute difference, where both have data.

    The encoder is one and the same for both (a Siamese network; concatenation and difference as in Daudt et al. 2018,
    Fully convolutional Siamese networks for change detection).
    """
    before, after = features.valid.unflatten(0, (-1, 2)).unbind(1)
    valid = before & after
    patches = _joined(rearrange(features.patches, "(b two) h w d -> b two h w d", two=2))
    summary = _joined(rearrange(features.summary, "(b two) d -> b two d", two=2))
    return Features(
        patches=_where(valid, patches),
        summary=_where(valid.flatten(1).any(1), summary),
        valid=valid,
        patch_m=features.patch_m,
    )


def _joined(pair: Float[Tensor, "b two *rest d"]) -> Float[Tensor, "b *rest e"]:
    before, after = pair.unbind(1)
    return torch.cat([before, after, (before - after).abs()], dim=-1)


def _where(valid: Bool[Tensor, "*n"], x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    return torch.where(valid[..., None], x, 0.0)
