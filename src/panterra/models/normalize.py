"""The statistics that turn declared units into what a model was trained on."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

import torch
from jaxtyping import Float
from torch import Tensor

from panterra.errors import InputError
from panterra.modalities import MODALITIES

MISSING = -99999.0
"""OlmoEarth's mark for a missing value, before and after normalisation."""


@lru_cache(maxsize=1)
def olmoearth_tables() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Read OlmoEarth's published constants (Ai2, OlmoEarth Artifact License): tables "standard" and "range"."""
    text = files("panterra.models").joinpath("olmoearth_normalization.json").read_text(encoding="utf-8")
    tables: dict[str, dict[str, dict[str, list[float]]]] = json.loads(text)
    return tables


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def olmoearth_range(modality: str) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Give the values that become 0 and 1, per band: two standard deviations around the mean, or a fixed range.

    y = (x - low) / (high - low), without clipping (OlmoEarth). Raises InputError for a modality without statistics.
    """
    if modality == "worldcover_onehot":
        bands = len(MODALITIES[modality].bands)
        return torch.zeros(bands, dtype=torch.float64), torch.ones(bands, dtype=torch.float64)
    tables = olmoearth_tables()
    if modality in tables["standard"]:
        row = tables["standard"][modality]
        mean, std = (torch.tensor(row[key], dtype=torch.float64) for key in ("mean", "std"))
        return mean - 2 * std, mean + 2 * std
    if modality in tables["range"]:
        row = tables["range"][modality]
        return torch.tensor(row["lo"], dtype=torch.float64), torch.tensor(row["hi"], dtype=torch.float64)
    raise InputError(f"OlmoEarth has no statistics for {modality!r}; leave this modality out")


def normalize_olmoearth(pixels: Float[Tensor, "*b c"], modality: str) -> Float[Tensor, "*b c"]:
    """Normalise values whose last axis is the band, in float64; -99999 stays -99999."""
    low, high = olmoearth_range(modality)
    scaled = ((pixels.double() - low) / (high - low)).float()
    return torch.where(pixels == MISSING, MISSING, scaled)


BAND_NORMALIZATIONS = {
    "no_norm": (0.0, False, False),
    "standardize": (0.0, False, False),
    "norm_no_clip": (1.0, False, False),
    "norm_no_clip_2_std": (2.0, False, False),
    "norm_yes_clip": (1.0, True, False),
    "norm_yes_clip_2_std": (2.0, True, False),
    "norm_yes_clip_3_std": (3.0, True, False),
    "norm_yes_clip_int": (1.0, True, True),
    "norm_yes_clip_2_std_int": (2.0, True, True),
    "norm_yes_clip_3_std_int": (3.0, True, True),
    "norm_yes_clip_min_max_int": (0.0, True, True),
}
"""The evaluation protocols' ways to use a data set's own statistics: number of standard deviations that span
0 to 1, whether values outside are clipped, whether they pass through 8 bits."""


def normalize_bands(
    pixels: Float[Tensor, "*b c"],
    method: str,
    *,
    mean: Float[Tensor, " c"],
    std: Float[Tensor, " c"],
    low: Float[Tensor, " c"],
    high: Float[Tensor, " c"],
) -> Float[Tensor, "*b c"]:
    """Normalise values whose last axis is the band by a data set's statistics; `BAND_NORMALIZATIONS` lists how."""
    if method not in BAND_NORMALIZATIONS:
        raise InputError(f"no normalisation {method!r}; known: {', '.join(BAND_NORMALIZATIONS)}")
    if method == "no_norm":
        return pixels
    if method == "standardize":
        return (pixels - mean) / std
    spread, clip, eight_bit = BAND_NORMALIZATIONS[method]
    if spread:
        low, high = mean - spread * std, mean + spread * std
    scaled = (pixels - low) / (high - low)
    if eight_bit:
        return (scaled * 255).clamp(0, 255).to(torch.uint8).float() / 255
    return scaled.clamp(0, 1) if clip else scaled
