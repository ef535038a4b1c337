"""From batches to one row of features per sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES
from panterra.models.features import Encoder, Features
from panterra.models.sub_patches import encode_sub_patches
from panterra.sample import Batch

What = Literal["summary", "patches", "dense", "centre"]

PERCENTILES = (10, 25, 50, 75, 90)


def embed_samples(
    encoder: Encoder,
    batches: Iterable[Batch],
    *,
    patch_m: float,
    what: What = "summary",
) -> np.ndarray:
    """Embed samples one batch at a time: float32 [N, D] for their summary or centre patch, [N, H', W', D] for patches.

    "dense" gives [N, Y, X, E], one vector per sub-patch of the modality with the smallest ones. Where a sample, patch
    or sub-patch has no data the row is NaN, so that a probe refuses it instead of learning from zeros.
    Raises InputError, also where the encoder has no sub-patches.
    """
    if what not in get_args(What):
        raise InputError(f"what is {what!r}; wanted 'summary', 'patches', 'dense' or 'centre'")
    rows: list[np.ndarray] = []
    for batch in batches:
        with torch.inference_mode():
            encode = encode_sub_patches if what == "dense" else _encode
            features = _choose(encode(encoder, batch, patch_m=patch_m), what)
        if rows and features.shape[1:] != rows[0].shape[1:]:
            sizes = f"{list(rows[0].shape[1:-1])} and {list(features.shape[1:-1])}"
            raise InputError(f"samples differ in their numbers of patches ({sizes}); crop them to one size")
        rows.append(features.to("cpu", torch.float32).numpy())
    if not rows:
        raise InputError("no batches came; give one at least")
    return np.concatenate(rows)


def _encode(encoder: Encoder, batch: Batch, *, patch_m: float) -> Features:
    return encoder.encode(batch, patch_m=patch_m)


def _choose(features: Features, what: What) -> Float[Tensor, "b *grid d"]:
    if what == "summary":
        return features.summary.masked_fill(~features.valid.any(2).any(1)[:, None], torch.nan)
    patches = features.patches.masked_fill(~features.valid[..., None], torch.nan)
    return patches[:, patches.shape[1] // 2, patches.shape[2] // 2] if what == "centre" else patches


def raw_band_statistics(batch: Batch) -> Float[np.ndarray, "b k"]:
    """Describe each band without any model: mean, std, min, max and percentiles over valid pixels and dates.

    This is the baseline that an encoder has to beat. Modalities in the batch's order, bands outer, statistics inner;
    NaN for a modality that a sample has no data of.
    """
    columns = []
    for o in batch.observations.values():
        bands = o.pixels.transpose(1, 2).flatten(2)
        seen = o.valid.flatten(1)[:, None].expand_as(bands) & bands.isfinite()
        columns.append(torch.cat([_moments(bands, seen), _percentiles(bands, seen)], dim=-1).flatten(1))
    return torch.cat(columns, dim=1).to("cpu", torch.float32).numpy()


def raw_patch_statistics(batch: Batch, patch_m: float) -> Float[np.ndarray, "b h w k"]:
    """Describe each patch without any model: per band its mean, std, min and max over dates, and its mean on each date.

    A date without valid pixels takes the band's mean over the patch's other dates; a patch without any is NaN in that
    modality. Weather and other values without a place are repeated over the grid.
    """
    placed = {
        n: o.pixels.shape[-2:] for n, o in batch.observations.items() if MODALITIES[n].kind in ("series", "still")
    }
    if not placed:
        raise InputError(f"{', '.join(batch.observations)} have no pixels in space; add imagery to cut into patches")
    # A modality finer than 10 m has more pixels than the common grid, a coarser one at most as many.
    extents = [[side * batch.pixel_m * min(MODALITIES[n].gsd, 10) / 10 for side in size] for n, size in placed.items()]
    counts = [max(sides) / patch_m for sides in zip(*extents, strict=True)]
    rows, columns = (round(count) for count in counts)
    if rows < 1 or columns < 1 or not np.allclose(counts, [rows, columns], atol=1e-3):
        raise InputError(
            f"samples measure {counts[0]:g} x {counts[1]:g} patches of {patch_m:g} m; wanted whole patches"
        )
    parts = [
        _describe_patches(name, o.pixels, o.valid, rows, columns).flatten(3) for name, o in batch.observations.items()
    ]
    return torch.cat(parts, dim=3).to("cpu", torch.float32).numpy()


def _describe_patches(
    name: str, pixels: Float[Tensor, "b t c y x"], valid: Bool[Tensor, "b t y x"], rows: int, columns: int
) -> Float[Tensor, "b h w c s"]:
    seen = (valid[:, :, None] & pixels.isfinite()).expand_as(pixels)
    for axis, wanted in ((3, rows), (4, columns)):
        side = pixels.shape[axis]
        if side < wanted and wanted % side == 0:
            pixels, seen = (t.repeat_interleave(wanted // side, dim=axis) for t in (pixels, seen))
        elif side % wanted:
            raise InputError(
                f"{name} has {side} pixels along {wanted} patches; resample it to a whole number per patch"
            )
    pixels, seen = (
        t.unflatten(4, (columns, -1)).unflatten(3, (rows, -1)).permute(0, 3, 5, 2, 1, 4, 6).flatten(5)
        for t in (pixels, seen)
    )
    overall = _moments(pixels.flatten(4), seen.flatten(4))
    by_date = _moments(pixels, seen)[..., 0]
    return torch.cat([overall, torch.where(by_date.isnan(), overall[..., :1], by_date)], dim=-1)


def _moments(values: Float[Tensor, "*s n"], seen: Bool[Tensor, "*s n"]) -> Float[Tensor, "*s 4"]:
    """Give mean, std, min and max over the last axis where seen; NaN where nothing is."""
    count = seen.sum(-1)
    mean = values.double().masked_fill(~seen, 0).sum(-1) / count
    std = (values - mean[..., None]).masked_fill(~seen, 0).square().sum(-1).div(count).sqrt()
    least, most = values.masked_fill(~seen, torch.inf).amin(-1), values.masked_fill(~seen, -torch.inf).amax(-1)
    return torch.stack([mean, std, least, most], dim=-1).masked_fill((count == 0)[..., None], torch.nan)


def _percentiles(values: Float[Tensor, "*s n"], seen: Bool[Tensor, "*s n"]) -> Float[Tensor, "*s q"]:
    """Interpolate percentiles over the last axis where seen, as numpy does; NaN where nothing is."""
    ordered = values.double().masked_fill(~seen, torch.inf).sort(-1).values
    last = seen.sum(-1, keepdim=True) - 1
    place = last * (torch.tensor(PERCENTILES, dtype=torch.float64, device=values.device) / 100)
    below, above = (ordered.gather(-1, side.long().clamp_min(0)) for side in (place.floor(), place.ceil()))
    between = below + (above - below) * (place - place.floor())
    return between.masked_fill(last < 0, torch.nan)
