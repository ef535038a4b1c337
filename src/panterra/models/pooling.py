"""From tokens to one vector per patch or per sample."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from panterra.modalities import MODALITIES
from panterra.models.features import Tokens


def patch_mean(out: Tokens) -> tuple[Float[Tensor, "b h w d"], Bool[Tensor, "b h w"]]:
    """Average each modality over its visible dates and band sets, then the modalities that the patch has.

    Also says which patches have any. Where every patch has every modality this is the published `spatial_pool`, which
    would count a modality that a patch lacks as a zero vector if any other sample of the batch has it.
    """
    means, present = [], []
    for name, x in _spatial(out).items():
        seen = out.visible[name]
        mean, count = _masked_mean(x.flatten(3, 4), seen.flatten(3))
        means.append(mean)
        present.append(count > 0)
    number = torch.stack(present).sum(0)
    total = means[0] if len(means) == 1 else torch.stack(means).sum(0)
    return total / number.clamp(min=1)[..., None], number > 0


def instance_pool(out: Tokens, how: Literal["mean", "max"] = "mean") -> Float[Tensor, "b d"]:
    """Pool the visible tokens of all modalities; the mean of a sample without any is zero (OlmoEarth)."""
    x = torch.cat([x.flatten(1, 4) for x in out.tokens.values()], dim=1)
    seen = torch.cat([out.visible[name].flatten(1) for name in out.tokens], dim=1)
    if how == "mean":
        return _masked_mean(x, seen)[0]
    return torch.where(seen[..., None], x, -torch.inf).amax(1)


def spatial_pool(out: Tokens, how: Literal["mean", "max"] = "mean") -> Float[Tensor, "b h w d"]:
    """Pool over dates and band sets, then average over the modalities that the batch has, as published.

    A patch that lacks a modality gets 0 (mean) or minus infinity (max) from it.
    """
    pooled = []
    for name, x in _spatial(out).items():
        seen = out.visible[name]
        if not bool(seen.any()):
            continue
        if how == "mean":
            pooled.append(_masked_mean(x.flatten(3, 4), seen.flatten(3))[0])
        else:
            pooled.append(torch.where(seen[..., None], x, -torch.inf).flatten(3, 4).amax(3))
    stacked = torch.stack(pooled)
    return stacked.mean(0) if how == "mean" else stacked.amax(0)


def concat_pool(out: Tokens) -> Float[Tensor, "b h w s d"]:
    """Average over dates and line up the band sets of every modality that is visible throughout (OlmoEarth)."""
    return torch.cat([x.mean(3) for name, x in _spatial(out).items() if bool(out.visible[name].all())], dim=3)


def _spatial(out: Tokens) -> dict[str, Float[Tensor, "b h w t s d"]]:
    return {name: x for name, x in out.tokens.items() if MODALITIES[name].kind in ("series", "still")}


def _masked_mean(
    x: Float[Tensor, "*b n d"], seen: Bool[Tensor, "*b n"]
) -> tuple[Float[Tensor, "*b d"], Int[Tensor, "*b"]]:
    count = seen.sum(-1)
    if bool(seen.all()):
        return x.mean(-2), count
    total = torch.where(seen[..., None], x, 0.0).sum(-2)
    return total / count.clamp(min=1)[..., None], count
